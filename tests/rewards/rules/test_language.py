"""The share of the target language: by script, between languages of one script, and what is not counted."""
# ruff: noqa: RUF001  letters of other scripts that look like Latin ones

import pytest
from pydantic import ValidationError

from rewards.rules.language import LanguageReward
from rewards.types import Task
from tests.bounds import processor_seconds

TASK = Task("", None)

TEXTS = {
    "en": "We know that every box holds six pens, so we first multiply and then take away those that were given back.",
    "de": "Wir wissen, dass in jeder Kiste sechs Stifte liegen, also nehmen wir erst mal und ziehen dann andere ab.",
    "fr": "Nous savons que chaque boîte contient six stylos, donc nous multiplions d'abord et soustrayons le reste.",
    "es": "Sabemos que en cada caja hay seis lápices, por eso primero multiplicamos y luego restamos los que sobran.",
    "it": "Sappiamo che ogni scatola contiene sei penne, quindi prima moltiplichiamo e poi togliamo quelle restituite.",
    "pt": "Sabemos que cada caixa contém seis canetas, então primeiro multiplicamos e depois tiramos as que sobraram.",
    "nl": "We weten dat in elke doos zes pennen zitten, dus we vermenigvuldigen eerst en trekken dan de rest ervan af.",
    "pl": "Wiemy, że w każdym pudełku jest sześć długopisów, więc najpierw mnożymy, a potem odejmujemy te zwrócone.",
    "tr": "Her kutuda altı kalem olduğunu biliyoruz, bu yüzden önce çarpıyoruz ve sonra geri verilenleri çıkarıyoruz.",
    "vi": "Chúng ta biết rằng mỗi hộp có sáu cây bút, vì vậy trước tiên ta nhân rồi sau đó trừ đi những cây trả lại.",
    "ru": "Мы знаем, что в каждой коробке лежит шесть ручек, поэтому сначала умножаем, а потом вычитаем возвращённые.",
    "uk": "Ми знаємо, що в кожній коробці лежить шість ручок, тому спочатку множимо, а потім віднімаємо повернуті.",
    "ar": "نعلم أن كل صندوق يحتوي على ستة أقلام، لذلك نضرب أولا ثم نطرح الأقلام التي أعيدت إلينا.",
    "fa": "می‌دانیم که در هر جعبه شش خودکار است، پس اول ضرب می‌کنیم و بعد آنهایی را که برگردانده شد کم می‌کنیم.",
    "hi": "हम जानते हैं कि हर डिब्बे में छह कलम हैं, इसलिए पहले हम गुणा करते हैं और फिर लौटाए गए कलम घटाते हैं।",
    "zh": "我们知道每个盒子里有六支笔。所以我们先做乘法。然后减去已经还回来的那些笔。",
    "ja": "それぞれの箱にペンが六本あることが分かっています。だから最初に掛け算をして、返された分を引きます。",
    "ko": "각 상자에 펜이 여섯 개 들어 있으므로 먼저 곱하고 그다음에 돌려받은 것을 뺍니다.",
    "el": "Ξέρουμε ότι κάθε κουτί έχει έξι στυλό, οπότε πρώτα πολλαπλασιάζουμε και μετά αφαιρούμε.",
    "he": "אנחנו יודעים שבכל קופסה יש שישה עטים, לכן קודם נכפיל ואחר כך נחסר את אלה שהוחזרו.",
    "th": "เรารู้ว่าแต่ละกล่องมีปากกาหกด้าม ดังนั้นเราคูณก่อนแล้วจึงลบ",
}


def share(language: str, completion: str) -> float:
    return LanguageReward(language=language).score(TASK, completion)


@pytest.mark.parametrize("language", TEXTS)
def test_only_the_target_language_counts(language: str) -> None:
    assert share(language, TEXTS[language]) == 1.0
    others = {other: share(language, text) for other, text in TEXTS.items() if other != language}
    assert max(others.values()) < 0.05, others


def test_mixed_scripts_by_hand() -> None:
    """Four Chinese characters and three English words."""
    assert share("zh", "所以我们 use the theorem") == pytest.approx(4 / 7)
    assert share("en", "所以我们 use the theorem") == pytest.approx(3 / 7)
    assert share("ru", "это is смесь") == pytest.approx(2 / 3)


def test_a_switch_of_language_within_a_script_costs_its_share() -> None:
    english, german = " ".join([TEXTS["en"]] * 6), " ".join([TEXTS["de"]] * 6)
    words = {text: len(text.split()) for text in (english, german)}
    exact = words[english] / sum(words.values())
    assert share("en", f"{english}\n{german}") == pytest.approx(exact, abs=0.1)
    assert share("de", f"{english}\n{german}") == pytest.approx(1 - exact, abs=0.1)


@pytest.mark.parametrize(
    "aside",
    [
        "```python\nfor key in values: print(key)\n```",
        "```\nnever closed",
        "`sorted(values)`",
        r"$\frac{apples}{pears} = x + y$",
        r"$$\text{total} = a + b$$",
        r"\(x = \text{apples}\)",
        r"\[x \\[2pt] = \text{apples}\]",
        r"\boxed",
        "<think></think>",
        "https://example.org/some/page",
        "12 3.5 + 7 = 4²",
    ],
)
def test_what_has_no_language_is_not_counted(aside: str) -> None:
    for language in ("zh", "ru", "en"):
        assert share(language, f"{TEXTS[language]} {aside}") == 1.0


def test_a_completion_without_words_is_in_no_other_language() -> None:
    assert share("zh", r"\boxed{}") == share("en", "") == share("de", "12 + 3 = 15") == 1.0


def test_too_few_words_to_tell_are_not_doubted() -> None:
    assert share("en", "Paris") == share("de", "Paris") == 1.0
    assert share("en", "巴黎") == 0.0


def test_an_unknown_language_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ValidationError, match="'eng': did you mean 'en'"):
        LanguageReward(language="eng")


@pytest.mark.parametrize(
    "pattern",
    ["\\(", "\\[", "\\(a", "$$", "$ $$ ", "$", "```", "``` `", "`", "\\", "<a", "http://", "a ", "字", "\0", "\ud800"],
)
def test_a_megabyte_of_anything_is_judged_in_seconds(pattern: str) -> None:
    text = pattern * (1_000_000 // len(pattern))
    with processor_seconds(60):
        assert 0 <= share("en", text) <= 1


def test_the_same_text_has_the_same_share() -> None:
    text = f"{TEXTS['de']} {TEXTS['nl']} {TEXTS['en']} 所以"
    assert len({share("nl", text) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("completion", "chinese"),
    [
        # 我先加二 is 4 words, "then" and "carry" are 2: 4/6. The answer in English does not count.
        ("<think>我先加二, then carry 1</think>The answer is 71", 4 / 6),
        ("我先加二, then carry 1</think>答案", 4 / 6),  # the template has opened the thought
        ("<think>我先加二, then carry 1", 4 / 6),  # cut short
        ("<think>8+3是11;5+1+1 is 7</think>71", 1 / 2),  # numbers are no words
        ("<think>8+3是11</think>71", 1.0),
        ("<think>8+3=11</think>71", 1.0),  # no words, so none of another language
        ("<think> </think>答案", 0.0),  # an empty thought earns nothing
        ("答案是七十一", 0.0),  # nor does none
    ],
)
def test_only_the_words_of_the_thought_count(completion: str, chinese: float) -> None:
    reward = LanguageReward(language="zh", part="thought")
    assert reward.score(TASK, completion) == pytest.approx(chinese)


def test_the_language_may_stand_in_a_column_of_the_row() -> None:
    """Three words each: of "add 二 three", one is Chinese and two are English."""
    reward = LanguageReward(language="column:language", part="thought")
    for language, share_of_it in (("zh", 1 / 3), ("en", 2 / 3)):
        task = Task("", None, metadata={"language": language})
        reward.check(task)
        assert reward.score(task, "<think>add 二 three</think>") == pytest.approx(share_of_it)
    with pytest.raises(ValueError, match="no column 'language'"):
        reward.check(TASK)
    with pytest.raises(ValueError, match="'eng': did you mean 'en'"):
        reward.check(Task("", None, metadata={"language": "eng"}))

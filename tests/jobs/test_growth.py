import pytest

from jobs.bench import growth


def test_the_powers_of_known_series_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(factors: dict[str, int], steps: int) -> dict[str, float]:
        assert steps == 2
        prompts, layers = factors.get("prompts_per_step", 1), factors.get("num_hidden_layers", 1)
        return dict.fromkeys(growth.PARTS, 3.0 * prompts * layers**0.5) | {"sync": 0.1}

    monkeypatch.setattr(growth, "_measured", measured)
    exponents = growth.growth(steps=2)
    assert exponents["prompts_per_step/train"] == pytest.approx(1)
    assert exponents["num_hidden_layers/step"] == pytest.approx(0.5)
    assert exponents["group_size/generate"] == exponents["prompts_per_step/sync"] == pytest.approx(0)

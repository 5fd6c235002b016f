"""Find the file of a chat template."""

from pathlib import Path

import configs


def template_file(chat_template: str) -> Path:
    """Return the path `chat_template` if it is a file, else the shipped template of that name.

    Raises ValueError with the names of the shipped templates.

    Example: `template_file("chatml")`
    """
    folder = Path(configs.__file__).parent / "templates"
    for file in (Path(chat_template).expanduser(), folder / f"{chat_template}.jinja"):
        if file.is_file():
            return file
    shipped = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
    raise ValueError(
        f"model.chat_template='{chat_template}': no such file; give a file with a Jinja chat template, or the name of "
        f"a shipped one: {shipped}"
    )

"""`alignyard docs`: the pages that messages and help texts name, in the terminal."""

from importlib.metadata import files
from pathlib import Path
from typing import Annotated

from rich.markdown import Markdown
from typer import Argument

from jobs.command import OUT, plain_table, verb_app
from jobs.import_guard import INSTALL_FOLDER, IS_CHECKOUT

app = verb_app()


@app.command()
def docs(
    page: Annotated[
        str | None, Argument(metavar="PAGE", help="Its name, such as sft for docs/sft.md. [default: a list]")
    ] = None,
) -> int:
    """Show a page of the documentation, or list the pages.

    \b
    Examples:
      alignyard docs
      alignyard docs sft
      alignyard docs configs | less
    """
    pages = installed_pages()
    if page is None:
        table = plain_table("page", "")
        for name, file in pages.items():
            table.add_row(name, file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# "))
        OUT.print(table)
        return 0
    name = page.removeprefix("docs/").removesuffix(".md")
    if name not in pages:
        raise ValueError(f"PAGE='{page}': the pages are {', '.join(pages) or 'not installed'}")
    text = pages[name].read_text(encoding="utf-8")
    OUT.print(Markdown(text, hyperlinks=False) if OUT.is_terminal else text, markup=False, highlight=False)
    return 0


def installed_pages() -> dict[str, Path]:
    """The pages by name: those of the checkout, or those that the wheel brought."""
    if IS_CHECKOUT:
        found = (INSTALL_FOLDER / "docs").glob("*.md")
    else:
        found = (Path(str(file.locate())) for file in files("alignyard") or () if file.suffix == ".md")
    return {file.stem: file for file in sorted(found)}

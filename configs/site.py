"""Write the pages of the site into a folder: `python -m configs.site FOLDER`, run from a checkout.

They are those of docs/, the README as the first page, and the reference of settings with a page for each stage. `make
site` builds the site of them by mkdocs.yml, which has their order.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from configs.documentation import reference_pages

DOCS = "docs"
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the checkout's root, and their names on the site."""
SECURITY = "SECURITY.md"
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)]*)?\)")


def write_site(home: Path, folder: Path) -> None:
    """Write the pages of the checkout at `home`, and all that they link to, into an empty `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / DOCS, folder)
    for name, page in {**ROOT_PAGES, SECURITY: "security.md"}.items():
        (folder / page).write_text(_moved((home / name).read_text(encoding="utf-8")), encoding="utf-8")
    for page in folder.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("](../README.md", "](index.md"), encoding="utf-8")
    reference = folder / "reference"
    reference.mkdir()
    for name, text in reference_pages().items():
        (reference / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / "configs.md").unlink()
    for page in folder.rglob("*.md"):
        text = page.read_text(encoding="utf-8").replace("](configs.md)", "](reference/index.md)")
        page.write_text(text.replace("](../configs.md)", "](../reference/index.md)"), encoding="utf-8")
    (folder / "decisions" / "index.md").write_text("".join(_decisions(folder / "decisions")), encoding="utf-8")


def _moved(text: str) -> str:
    """A page of the root with its links as they are among the pages of docs/."""

    def target(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        path = ROOT_PAGES.get(path, path.removeprefix(f"{DOCS}/"))
        path = {SECURITY: "security.md", "decisions": "decisions/index.md"}.get(path, path)
        return f"]({path}{anchor})"

    return LINK.sub(target, text)


def _decisions(folder: Path) -> Iterator[str]:
    """The lines of the list of decisions."""
    yield "# Decisions\n\nFor people who ask why: the choices that rest on a measurement, each with its figures.\n\n"
    for file in sorted(folder.glob("[0-9]*.md")):
        yield f"* [{file.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}]({file.name})\n"


if __name__ == "__main__":
    write_site(Path.cwd(), Path(sys.argv[1]))

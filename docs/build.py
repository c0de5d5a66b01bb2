"""Render the documentation: the pages as they are, and the reference from the docstrings, formulae included.

``python docs/build.py FOLDER`` writes ``FOLDER/index.html`` (docs/index.md), one file per page, and one per module.
"""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render
from pdoc.render_helpers import to_html

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["docs/index.md", "docs/design.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pyro_genmods: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
pre, code {{ font: 14px/1.45 ui-monospace, monospace; background: #f5f5f5 }}
pre {{ padding: .8rem; overflow-x: auto }}
table {{ border-collapse: collapse }} th, td {{ border: 1px solid #ccc; padding: .3rem .6rem; text-align: left }}
</style>
{mathematics}
</head>
<body><main class="pdoc">
{body}
</main></body>
</html>
"""


def page(path: Path) -> str:
    """One page as HTML; links to other pages lead to their HTML, other links are left alone."""
    text = re.sub(r"\]\((?:\.\./|docs/)*(\w+)\.md", r"](\1.html", path.read_text())
    text = text.replace("](docs/", "](").replace("`build/docs/pyro_genmods.html`", "[pyro_genmods](pyro_genmods.html)")
    mathematics = pdoc.render.env.get_template("math.html.jinja2").render()
    return FRAME.format(title=path.stem, mathematics=mathematics if "$" in text else "", body=to_html(text))


def modules() -> list[str]:
    """Every module that has no underscore; pdoc by itself stops at what ``__all__`` names."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "pyro_genmods").rglob("*.py"))]
    public = [path for path in paths if not path.name.startswith("_") or path.name == "__init__"]
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in public)


def build(folder: Path) -> None:
    """Write reference and pages."""
    pdoc.render.configure(docformat="google", math=True, include_undocumented=False)
    with warnings.catch_warnings():  # pdoc finds the modules of a package without __all__ by itself, and says so
        warnings.filterwarnings("ignore", message="The module specification")
        pdoc.pdoc(*modules(), output_directory=folder)
    for name in PAGES:
        (folder / f"{Path(name).stem}.html").write_text(page(ROOT / name))
    for path in (ROOT / "LICENSE", *sorted((ROOT / "docs").glob("*.png"))):
        shutil.copy(path, folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

"""What `make docs` does beside plain MkDocs: pages from files outside `docs/`, and Sphinx roles in docstrings."""

import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension, NameResolutionError, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {str(path.relative_to(ROOT)): f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the changelog and the notebooks, with their outputs, as pages."""
    for source, page in PAGES.items():
        path = ROOT / source
        if not path.exists():
            continue
        contents: dict[str, str | bytes] = {}
        if path.suffix == ".ipynb":
            contents[page], resources = MarkdownExporter().from_filename(str(path))
            contents |= {f"notebooks/{name}": image for name, image in resources["outputs"].items()}
        else:
            contents[page] = re.sub(r"(?<=\]\()[^)#:]+", _link_in_site, path.read_text())
        for uri, content in contents.items():
            files.append(File.generated(config, uri, content=content))
    return files


def _link_in_site(link: re.Match[str]) -> str:
    """Where the site has the file that a page at the repository's root links to."""
    return PAGES.get(link[0], link[0].removeprefix("docs/"))


class SphinxRoles(Extension):
    """Turns the Sphinx markup of the docstrings into Markdown: roles into links, ``Example::`` into a code block."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r":\w+:`(~?)([\w.]+)`", lambda role: _link_to(obj, role[2]), obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the name that Griffe knows
        obj.docstring.value = re.sub(r"^Example::\n\n((?:    .*\n?|\n)+)", _code_block, text, flags=re.MULTILINE)


def _link_to(obj: Object, name: str) -> str:
    """Links to this package's names. Other packages' stand as code: their inventories are in the network."""
    label = name.rpartition(".")[2]
    if "." not in name:
        try:
            name = obj.resolve(name)
        except NameResolutionError:
            name = f"{obj.parent.path}.{name}" if obj.is_function and obj.parent else name
    return f"[`{label}`][{name}]" if name.startswith("bs_lightning") else f"`{label}`"


def _code_block(example: re.Match[str]) -> str:
    return f"**Example:**\n\n```python\n{textwrap.dedent(example[1]).strip()}\n```\n\n"

"""What `make docs` does beside plain MkDocs: pages from files outside `docs/`, and Sphinx roles in docstrings."""

import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension, NameResolutionError, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")}
PAGES = {source: page for source, page in PAGES.items() if (ROOT / source).exists()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the changelog and the notebooks, with their outputs, as pages."""
    for source, page in PAGES.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            named = {"unique_key": path.stem}  # or the images of two notebooks have the same names
            text, resources = MarkdownExporter().from_filename(str(path), resources=named)
            for name, image in resources["outputs"].items():
                files.append(File.generated(config, f"notebooks/{name}", content=image))
        else:
            text = path.read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Let links between the repository's files lead to their pages."""
    uri = page.file.src_uri
    source = next((source for source, target in PAGES.items() if target == uri), f"docs/{uri}")

    def in_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        return posixpath.relpath(PAGES.get(path, path.removeprefix("docs/")), posixpath.dirname(uri) or ".")

    return re.sub(r"(?<=\]\()[^)#:]+(?=[)#])", in_site, markdown)


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

"""Hooks of MkDocs (mkdocs.yml): pages outside docs/, the notebook, and links to files of the
repository."""

import json
import re
import sys
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from notebook import NOTEBOOK, markdown

ROOT = Path(__file__).resolve().parents[1]
# File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "MODEL_ZOO.md": "model_zoo.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "projects/ATSS/README.md": "how_it_works.md",
    "docs/README.md": "pages.md",
    "docs/quickstart.ipynb": "notebook.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
KEY = re.compile(r"(?<=<code>)[A-Z][A-Z_]+[._]\w[\w.]*(?=</code>)")
# In HTML, so that it stays a link to the file.
DOWNLOAD = '<p><a href="quickstart.ipynb" download>Download this page as a notebook</a></p>\n'
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files, config):
    """Add the pages outside docs/."""
    for source, page in PAGES.items():
        if source.endswith(".ipynb"):
            title, text = markdown(json.loads(NOTEBOOK.read_text())).split("\n", 1)
            text = f"{title}\n\n{DOWNLOAD}\n{text}"
            files.append(File.generated(config, page, content=text))
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links of the repository at pages of the site; copy other files that are linked."""
    uri = page.file.src_uri
    folder = dirname(SOURCES.get(uri, f"docs/{uri}"))

    def site_link(match):
        path = normpath(f"{folder}/{match[1]}" if folder else match[1])
        target = PAGES.get(path, path.removeprefix("docs/"))
        if (ROOT / path).is_file() and files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        return relpath(target, dirname(uri) or ".") + (match[2] or "")

    return LINK.sub(site_link, markdown)


def on_page_content(html, page, config, files):
    """Let config keys break after a dot or an underscore (site.css: on phones alone)."""
    return KEY.sub(lambda match: re.sub(r"(?<=[._])", "<wbr>", match[0]), html)

"""MkDocs hook: what the site needs beyond the pages in docs/.

CHANGELOG.md, CONTRIBUTING.md and SECURITY.md become pages. Links to files that are no pages lead to
the repository if QUAKE_JAX_REPOSITORY has its address, and else are plain text.
"""

import os
import posixpath
import re

from mkdocs.structure.files import File

_ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
# [text](target) of a relative target, but no image.
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def on_files(files, config):
    """Add the pages that lie in the repository's root."""
    root = os.path.dirname(config.config_file_path)
    for name in _ROOT_PAGES:
        with open(os.path.join(root, name), encoding="utf-8") as page:
            files.append(File.generated(config, name.lower(), content=page.read()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links of the site."""
    uri = page.file.src_uri
    in_root = uri.upper() in (name.upper() for name in _ROOT_PAGES)
    folder = "." if in_root else posixpath.join("docs", posixpath.dirname(uri))

    def site_link(match: re.Match) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        anchor = f"#{anchor}" if anchor else ""
        source = path.removeprefix("docs/") if path.startswith("docs/") else path.lower()
        if files.get_file_from_path(source):
            link = posixpath.relpath(source, posixpath.dirname(uri) or ".")
            return f"[{text}]({link}{anchor})"
        repository = os.environ.get("QUAKE_JAX_REPOSITORY")
        return f"[{text}]({repository}/blob/main/{path}{anchor})" if repository else text

    return _LINK.sub(site_link, markdown)

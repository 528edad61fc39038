"""Bring the catalogues of translations up to date with the sources: `python -m sdxl_trainer.configs.language`.

Edit the catalogue afterwards: translate new messages; correct fuzzy ones and remove the mark `#, fuzzy`.
"""

import sys
from pathlib import Path

from sdxl_trainer.configs.document import list_pages
from sdxl_trainer.configs.language.catalogue import format_catalogue, read_catalogue
from sdxl_trainer.configs.language.messages import extract_messages
from sdxl_trainer.configs.language.pages import extract_from_pages
from sdxl_trainer.configs.language.translate import CATALOGUES
from sdxl_trainer.configs.language.update import list_faults, update_entries

ROOT = Path(__file__).resolve().parent.parent.parent


def list_messages() -> dict[str, tuple[str, ...]]:
    """Return the messages of the sources and the texts of pages and of generated documents, each with its sources."""
    messages = extract_messages(ROOT)
    for page, text in ((page, text) for page, texts in list_pages().items() for text in texts):
        escaped = text.replace("{", "{{").replace("}", "}}")
        messages[escaped] = (*messages.get(escaped, ()), page)
    for text, page in extract_from_pages(ROOT):
        if page not in messages.get(text, ()):
            messages[text] = (*messages.get(text, ()), page)
    return messages


def main() -> int:
    """Update every catalogue and print what is left to do. Returns 1 if anything is."""
    faults = []
    for path in CATALOGUES.values():
        entries = update_entries(read_catalogue(path) if path.exists() else [], list_messages())
        path.write_text(format_catalogue(path.stem, entries), encoding="utf-8")
        faults += list_faults(entries)
        sys.stdout.write(f"{path}: {len(entries)} messages\n")
    sys.stdout.writelines(f"{fault}\n" for fault in faults)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

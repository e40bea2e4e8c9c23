"""A folder is a tenant: a package, `adapter_config.json` that names its base, and a model card. Such folders go to the Hub."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from . import checkpoint, sources

ADAPTER = "adapter_config.json"
CARD = "README.md"


def save_folder(
    package: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: str,
    *,
    name: str | None = None,
    license: str | None = None,
) -> Path:
    """Make the folder of a tenant, which is taken wherever a package is: the package, `adapter_config.json` and a model card.

    Args:
        package: what `sources.located` takes.
        folder: made if it is missing; of what is in it, only those three files are replaced.
        base: the base's Hub name (`owner/name`) or folder, as `from_pretrained` takes it.
        name: of the package there; None: as it is called now. license: for the card's head.

    Returns:
        The folder.

    Raises:
        ValueError: `package` is none, or `folder` holds another one already; OSError.
    """
    found = sources.located(package)
    about = checkpoint.inspect(found)
    folder = Path(folder)
    name = name or found.name.removesuffix(sources.SUFFIX)
    if os.sep in name or name.startswith(".") or not name:
        raise ValueError(f"name must be one of a file, but is {name!r}")
    if not isinstance(base, str) or not base:
        raise ValueError(f"base must be the base's name or folder, but is {base!r}")
    target = folder / f"{name}{sources.SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    others = [p.name for p in folder.glob(f"*{sources.SUFFIX}") if p.name != target.name]
    if others:
        raise ValueError(f"{folder} holds {others[0]} already, and a tenant's folder holds one package")
    if not (target.exists() and os.path.samefile(found, target)):
        _whole(target, lambda part: shutil.copyfile(found, part))
    described = {
        "peft_type": "XORZ",
        "base_model_name_or_path": base,
        "package": target.name,
        "package_bytes": about["package_bytes"],
    }
    _whole(folder / ADAPTER, lambda part: part.write_text(json.dumps(described, indent=2) + "\n"))
    text = card(about, target.name, base, license)
    _whole(folder / CARD, lambda part: part.write_text(text))
    return folder


def _whole(path: Path, write: Any) -> None:
    """A file appears when it is complete."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def card(about: dict[str, Any], package: str, base: str, license: str | None = None) -> str:
    """A model card from what `xorz.inspect` says: what changed, sizes, the base, and how to load it.

    The base goes by its digest: the first tensors' are listed, and loading compares all of them.
    """
    entries = about["entries"]
    changed = [e for e in entries if e.get("changed")]
    share = about["changed"] / about["words"] if about["words"] else 0.0
    ratio = about["tensor_bytes"] / about["package_bytes"]
    head = ["---", "library_name: xorz"]
    if _is_hub(base):
        head += [f"base_model: {base}", "base_model_relation: finetune"]
    head += [f"license: {license}"] if license else []
    lines = [*head, "tags:", "- xorz", "---", "", f"# {package.removesuffix(sources.SUFFIX)}", ""]
    lines += [
        f"A fine-tune of `{base}`, as the exact (lossless) difference of its weights: {about['package_bytes']:,} bytes "
        f"in place of {about['tensor_bytes']:,} ({ratio:.1f} times as small).",
        "",
        "| | |",
        "|---|---|",
        f"| tensors | {about['tensors']:,}: {len(changed):,} changed, {about['unchanged']:,} as in the base, "
        f"{about['alone']:,} stored alone, {about['removed']:,} left out |",
        f"| words that differ | {about['changed']:,} of {about['words']:,} ({share:.3%}) |",
        f"| format | package version {about['format_version']} |",
    ]
    shown = [e for e in entries if e.get("base")][:3]
    lines += [f"| base, digest of `{_cell(e['base_name'] or e['name'])}` | `{e['base']}` |" for e in shown]
    most = sorted(changed, key=lambda e: -e["stored_bytes"])[:10]
    if most:
        lines += [
            "",
            "## What changed most",
            "",
            "| tensor | dtype | shape | changed words | bytes |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| `{_cell(e['name'])}` | {e['dtype']} | {'x'.join(map(str, e['shape']))} "
            f"| {e['changed']:,} | {e['stored_bytes']:,} |"
            for e in most
        ]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import xorz",
        "",
        'model = xorz.from_pretrained("THIS REPOSITORY OR FOLDER")  # the base, computing as this fine-tune',
        "```",
        "",
        f"`xorz unpack BASE {package} OUT` writes the fine-tuned checkpoint, byte for byte.",
        "",
    ]
    return "\n".join(lines)


def _is_hub(base: str) -> bool:
    return not os.path.exists(base) and base.count("/") == 1 and not base.startswith((".", "/"))


def _cell(name: str) -> str:
    """A tensor's name, which may be anything, in a table of Markdown."""
    return "".join(c if c.isprintable() and c not in "|`<>" else "?" for c in name)[:120]


def push(
    source: str | os.PathLike[str],
    repository: str,
    base: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a tenant to the Hub: `xorz push SOURCE OWNER/NAME --base BASE`.

    Args:
        source: a tenant's folder, whose own card and files are kept, or a package, for which they are made.
        repository: `owner/name`, made if it is missing (`private` as the Hub's default, or as said).
        base: for a package: its base's name. A folder's `adapter_config.json` says it already.
        token, revision: as huggingface_hub takes them. message: of the commit. license: for a card that is made.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a package and no `base`; ModuleNotFoundError: huggingface_hub is not installed; OSError, and what it raises.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to push to the Hub, huggingface_hub is needed: pip install huggingface_hub"
        ) from error
    package = sources.located(source)
    checkpoint.inspect(package)
    with tempfile.TemporaryDirectory(prefix="xorz-push-") as scratch:
        folder = Path(source) if Path(source).is_dir() else None
        if folder is None or not (folder / ADAPTER).exists():
            if base is None:
                raise ValueError(f"{source} does not say what its base is; name it (base=, or --base)")
            made = save_folder(package, Path(scratch) / "tenant", base, license=license)
            if folder is not None and (folder / CARD).exists():
                shutil.copyfile(folder / CARD, made / CARD)
            folder = made
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"xorz: {package.name}",
            ignore_patterns=["*.safetensors", "*.bin", "*.pt", ".*"],
        )
    return str(commit.commit_url)

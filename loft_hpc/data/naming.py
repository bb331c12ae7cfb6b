"""Which names count as images: one rule for folders, tars of a class and shards."""

from torchvision.datasets.folder import IMG_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or a folder on the way to it begins with a dot (macOS's ._x.jpg, .ipynb_checkpoints): no part of a data set."""
    return "/." in f"/{name}" and any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def is_image(name: str) -> bool:
    """Whether a file of this name, which is not hidden, is an image: torchvision's endings."""
    return name.lower().endswith(IMG_EXTENSIONS)

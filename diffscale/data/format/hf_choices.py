"""What a person may choose where a Hugging Face dataset can be read in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from diffscale.core.errors import UserError

NONE = "none"  # as a label column: use no labels
ALL = "*"  # as a configuration: join all of them


@dataclass(frozen=True)
class Choices:
    """Choices among the readings of a dataset; None takes the only one there is, and several are refused.

    config: configuration, or a pattern such as `*` that joins several
    image_column: column of the images (in a tar: extension of the images, such as `jpg`)
    label_column: column of the classes (in a tar: extension, or `json.KEY`); `none` uses no labels
    split_names: which splits are trained on and held out, `train=NAME,heldout=NAME`
    channels: 3 decodes to RGB, 1 to grey; None is grey if every image is
    command: errors name the options of `data build` instead of the settings `data.*`
    """

    config: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_names: str | None = None
    channels: int | None = None
    command: bool = False

    def option(self, name: str) -> str:
        """Return how a person spells a choice: `--label-column` or `data.label_column`."""
        return f"--{name.replace('_', '-')}" if self.command else f"data.{name}"

    @property
    def place(self) -> str:
        """The name of the argument or setting that holds the dataset's place."""
        return "SOURCE" if self.command else "data.path"

    @property
    def made(self) -> list[tuple[str, Any]]:
        """The choices that were made: (name, value)."""
        return [(name, value) for name, value in asdict(self).items() if name != "command" and value is not None]

    def ask(self, name: str, found: Sequence[str], what: str, fix: str = "") -> UserError:
        """Return the error for a choice that has several answers or a wrong one.

        name: field of the choice
        found: the valid answers
        what: what is chosen, in the singular ("column of images")
        """
        several = ", ".join(found[:20]) + (" ..." if len(found) > 20 else "")
        given = getattr(self, name)
        spelled = self.option(name)
        return UserError(
            setting=spelled,
            value=given,
            expected=f"one of: {several}" if found else f"a {what}; there is none",
            reason=f"there is more than one {what}" if given is None else f"there is no such {what}",
            fix=fix or (f"{spelled}{' ' if self.command else '='}{found[0]}" if found else ""),
        )

    def to_text(self) -> str:
        """Return the choices that were made as a URL's query."""
        return urlencode(self.made)

    @staticmethod
    def from_text(text: str) -> Choices:
        """Read the output of `to_text`."""
        given = dict(parse_qsl(text, keep_blank_values=True))
        channels = int(given["channels"]) if "channels" in given else None
        return Choices(
            given.get("config"),
            given.get("image_column"),
            given.get("label_column"),
            given.get("split_names"),
            channels=channels,
        )

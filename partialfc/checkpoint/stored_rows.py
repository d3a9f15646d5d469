"""The class centers of a checkpoint without its head: a piece at a time, on the CPU.

What a piece takes does not grow with the identities, so a machine that holds a part of the rows
reads all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from partialfc.checkpoint.folder import read_manifest
from partialfc.checkpoint.parts import head_of
from partialfc.checkpoint.reading import complete, read_centers, read_tensors
from partialfc.config import Config, ConfigError
from partialfc.config.heads import each_head
from partialfc.errors import CheckpointError, DamagedError
from partialfc.head.centers import stored_centers
from partialfc.head.rows.formats import DTYPES
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.model.build import margin_of, row_rule_of, seed_of

_PIECE_BYTES = 16 << 20
"""Of fp32 rows; their states and copies are some times that."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a head with their states, as :func:`read_centers` fills them."""

    owned_rows: range
    optimizer: RowOptimizer

    @property
    def centers(self) -> nn.Parameter:
        """As they are stored."""
        return self.optimizer.centers

    def lists(self) -> dict[str, Tensor]:
        """None: nobody searches neighbours here."""
        return {}

    def loaded(self) -> None:
        """Nothing is kept of before."""


class StoredRows:
    """The centers of a run with one head, in a checkpoint whose checksums have been compared.

    Args:
        path: Of the checkpoint.
        config: Of the run.

    Attributes:
        num_identities: C.
        per_identity: Rows of each.
        width: Numbers of a row.
        seed: Of the head.

    Raises:
        ConfigError: If the run has several heads.
    """

    def __init__(self, path: Path, config: Config) -> None:
        if len(heads := each_head(config)) > 1:
            raise ConfigError(
                f"the run has the heads {', '.join(heads)}, and this is for runs with one head."
            )
        margin, self._path, self._config = margin_of(config), path, config
        self._manifest = read_manifest(path)
        self.num_identities: int = self._manifest["num_identities"]
        self.per_identity = margin.centers_per_identity
        self.width = config.backbone.embedding_dim + margin.bias
        self.seed = seed_of(config, "")
        self.piece = max(1, _PIECE_BYTES // (4 * self.per_identity * self.width))
        """Identities of a piece."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield fp32 rows [n, width] in order, those that move unsampled up to date.

        Raises:
            CheckpointError: If a file or a tensor is not what the run's settings say.
        """
        total, each = self.num_identities * self.per_identity, self.piece * self.per_identity
        for start in range(0, total, each):
            yield self._read(range(start, min(start + each, total)))

    def _read(self, rows: range) -> Tensor:
        settings, manifest = self._config.head, self._manifest
        optimizer = RowOptimizer(
            nn.Parameter(
                torch.empty(len(rows), self.width, dtype=DTYPES[settings.center_format]),
                requires_grad=False,
            ),
            row_rule_of(self._config),
            first_row=rows.start,
            seed=self.seed,
            every_row=settings.sample_rate == 1,
        )
        try:
            read_centers(self._path, manifest, Piece(rows, optimizer), "", compare=False)
            optimizer.param_groups[0]["steps"] = manifest["step"]
            if shared := optimizer.shared_state():
                found = read_tensors(self._path, head_of(""), manifest, "cpu", compare=False)
                optimizer.load_shared_state(complete(shared, found))
        except DamagedError:
            raise
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        optimizer.catch_up(None)
        return stored_centers(optimizer.centers, optimizer.states())

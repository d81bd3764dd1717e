"""The checkpoints of one run as all its ranks see them: the newest good one, and how many stay."""

import logging
from pathlib import Path

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint import ranks
from megatron_ext.checkpoint.load import verify_together

logger = logging.getLogger(__name__)


class Shelf:
    """Checkpoints in ``folder``, of which the ``keep`` newest good ones stay. Calls are collective.

    What this object has verified once, or what the saver read back, is not read again.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._trusted: set[Path] = set()

    def newest_good(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest checkpoint whose every byte is as written, and those passed over with why."""
        bad: list[tuple[Path, str]] = []
        for path in ranks.from_first(list(folders.candidates(self.folder))):
            try:
                verify_together(path)
            except folders.DamagedCheckpoint as why:
                bad.append((path, str(why)))
                continue
            self._trusted.add(path)
            return path, bad
        return None, bad

    def added(self, path: Path, *, read_back: bool = False) -> list[Path]:
        """Verify the checkpoint just saved, then delete what it makes superfluous.

        ``read_back`` says that the saver has verified it in the background. Returns the deleted.

        Raises:
            DamagedCheckpoint: it is not what was written; nothing has been deleted.
        """
        if not read_back:
            verify_together(path)
        self._trusted.add(path)
        self._verify_those_that_stay()
        deleted: list[Path] = []
        if ranks.rank() == 0:
            deleted = folders.retain(self.folder, self.keep, trusted=self._trusted)
        deleted = ranks.from_first(deleted)
        self._trusted.difference_update(deleted)
        return deleted

    def _verify_those_that_stay(self) -> None:
        """Share the hashing of older ones out, which ``retain`` would leave to the first rank."""
        good = 0
        for path in ranks.from_first(list(folders.candidates(self.folder))):
            if path not in self._trusted:
                try:
                    verify_together(path)
                except folders.DamagedCheckpoint as why:
                    logger.warning("%s does not count as kept: %s", path, why)
                    continue
                self._trusted.add(path)
            good += 1
            if good >= self.keep:
                return

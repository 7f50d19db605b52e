"""What a run reads before its model is built: the text, its tokenizer, the loaders of a rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fundamentallm.compute.distributed import Ranks
from fundamentallm.config import DataConfig, RunConfig
from fundamentallm.config.global_batch import with_global_batch
from fundamentallm.data.loaders import Batching
from fundamentallm.data.overlap import overlap
from fundamentallm.data.sources import ExampleSource, Loaders, Source, read_source
from fundamentallm.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_from_dict
from fundamentallm.data.tokenizer.tokenizer_json import tokenizer_json
from fundamentallm.engine.wiring.conflicts import settle_kept_checkpoints
from fundamentallm.engine.wiring.exactness import refuse_other_rows
from fundamentallm.engine.wiring.run_directory import RunDirectory
from fundamentallm.engine.wiring.starting_point import StartingPoint, starting_point
from fundamentallm.errors import ConfigError, DataError
from fundamentallm.files.private import check_file
from fundamentallm.files.run_layout import CORPUS

logger = logging.getLogger(__name__)

LEAST_OVERLAP = 0.01  # share of the validation text that causes a warning


@dataclass(frozen=True)
class Inputs:
    """The inputs that a run reads before its model is built.

    Attributes:
        start: where its weights come from; its `config` includes the folder's settings.
        source: the text and its origin.
        tokenizer: between text and token ids.
        loaders: the loaders of this rank.
    """

    start: StartingPoint
    source: Source
    tokenizer: Tokenizer
    loaders: Loaders


def read_inputs(written: RunConfig, directory: RunDirectory, ranks: Ranks) -> Inputs:
    """Read the source and the tokenizer, and build the loaders of this rank.

    Raises:
        FundamentaLLMError: as `settle_kept_checkpoints`, `with_global_batch`, `refuse_other_rows`,
            `starting_point`, `read_data`, `choose_tokenizer`, `build_loaders`.
    """
    settled = settle_kept_checkpoints(written, begins=directory.checkpoint is None)
    agreed = with_global_batch(settled, ranks.world_size)
    if directory.checkpoint is not None and not directory.changes_rows:
        refuse_other_rows(directory.checkpoint, agreed, ranks)
    start = starting_point(agreed, directory)
    source = read_data(start.config.data, directory, ranks)
    tokenizer = choose_tokenizer(start.config, source, start.tokenizer(), directory)
    start.check_tokenizer(tokenizer)
    loaders = build_loaders(start.config, source, tokenizer, ranks)
    return Inputs(start, source, tokenizer, loaders)


def read_data(data: DataConfig, directory: RunDirectory, ranks: Ranks) -> Source:
    """Read the source, or the copy of a built-in one that the run keeps.

    The text of a built-in source can differ between two Python releases, so a run that is continued
    elsewhere must not read it again.

    Raises:
        DataError: the source cannot be used.
        CheckpointError: it differs from the source that the run started with.
    """
    if not ranks.is_writer:
        ranks.barrier()  # the first rank downloads, the others find it in the cache
    source = read_run_source(data, directory.path)
    if ranks.is_writer:
        ranks.barrier()
    if directory.checkpoint is not None:
        source.require_unchanged(
            directory.checkpoint.metadata["data"]["sha256"],
            fix="restore the text, or start a new run with --resume never",
        )
    return source


def read_run_source(data: DataConfig, run: Path) -> Source:
    """Read a run's source, with the run's copies in place of built-in texts.

    Raises:
        DataError: as `read_source`.
    """
    copy = run / CORPUS
    check_file(copy, writing=False)
    return read_source(
        str(copy) if copy.exists() else data.chosen_sources,
        kept=run,
        response_end=data.response_end,
    )


def choose_tokenizer(
    config: RunConfig, source: Source, given: Tokenizer | None, directory: RunDirectory
) -> Tokenizer:
    """Return the tokenizer of the token files, of the `init_from` folder, or of the configuration.

    A continued run takes the tokenizer of its checkpoint, so it is not trained again.

    Raises:
        ConfigError: the configured one cannot be built.
        DataError: the text does not suit it, or token files were made with another one than the
            weights to start from.
    """
    if source.tokenizer is not None:
        if given is not None and tokenizer_json(given) != tokenizer_json(source.tokenizer):
            raise DataError(
                "the tokens were made with another tokenizer than the weights of init_from",
                where=source.name,
                got=f"tokenizer {source.tokenizer.fingerprint()[:16]}",
                expected=f"tokenizer {given.fingerprint()[:16]}",
                fix="prepare the text with --tokenizer and the tokenizer.json in the folder of"
                " model.init_from",
            )
        return source.tokenizer
    if given is not None:
        return given
    if directory.checkpoint is not None:
        return tokenizer_from_dict(directory.checkpoint.metadata["tokenizer"])
    chosen = config.data.tokenizer
    with config.locating_errors("data.tokenizer"):
        return build_tokenizer(chosen.name, chosen.options, source.text)


def warn_of_overlap(data: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
    """Warn if validation text also occurs in the training text."""
    share = overlap(source, tokenizer, data.split)
    if share >= LEAST_OVERLAP:
        logger.warning(
            "%.1f %% of the validation text is in the training text too, so its loss says less"
            " about new text; `prepare --split document` puts equal documents into the same part",
            100 * share,
        )


def build_loaders(config: RunConfig, source: Source, tokenizer: Tokenizer, ranks: Ranks) -> Loaders:
    """Split the source into its parts and build the loaders for training and validation.

    Raises:
        DataError: there is too little, or an example does not fit.
    """
    batching = Batching(
        config.data.sequence_length,
        config.data.batch_size,
        config.training.accumulation_steps,
        config.seed,
        ranks.rank,
        ranks.world_size,
    )
    end_id = end_of_documents(config, source)
    return source.loaders(tokenizer, config.data.split, batching, end_id)


def end_of_documents(config: RunConfig, source: Source) -> int | None:
    """Return the end id for packed documents; None without document packing.

    Raises:
        ConfigError: they must be separate, but nothing marks where a document ends.
    """
    if config.data.packing == "continuous" or isinstance(source, ExampleSource):
        return None  # an example is always a separate row
    if source.end_id is None:
        with config.locating_errors("data.packing"):
            raise ConfigError(
                "nothing in this source marks where a document ends",
                got="packing: document",
                fix="run `prepare` on the text, and set data.source to its folder",
            )
    return source.end_id

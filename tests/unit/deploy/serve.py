"""Arguments of `vllm serve`, read by vLLM itself."""

import json
from argparse import Namespace
from collections.abc import Sequence

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from flashmemory_vllm.config import FlashMemoryConfig


def parse_arguments(arguments: Sequence[str]) -> tuple[Namespace, FlashMemoryConfig]:
    """Parse the arguments of a server that runs our backend, ours among them.

    Raises:
        SystemExit: vLLM refuses an argument.
        ConfigError: we refuse an option.
    """
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    assert parsed.attention_backend == "flashmemory"
    additional = parsed.additional_config
    additional = json.loads(additional) if isinstance(additional, str) else additional
    return parsed, FlashMemoryConfig.from_additional_config(additional)

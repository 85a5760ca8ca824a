"""Flags as the tutorials for KTransformers print them."""

from __future__ import annotations

from collections.abc import Sequence

# Settings that have another name here.
ALIASES = {
    "model_dir": "model_path",
    "cache_lens": "context",
    "max_batch_size": "max_sequences",
    "chunk_size": "chunk_tokens",
}


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


# The first group never did anything there either. The second chose between parts that ktd does not have:
# there is one backend and one scheduler, no database, and the prefix cache needs no set-up.
IGNORED = frozenset(
    flag(name)
    for name in """
    fast_safetensors dynamic_temperature cache_q4 cache_8bit json_mode healing ban_strings gpu_split length
    rope_scale rope_alpha no_flash_attn low_mem experts_per_token load_q4 draft_model_dir no_draft_scale modes
    mode username botname system_prompt smoothing_factor top_a skew response_chunk no_code_formatting
    ngram_decoding print_timings amnesia paged total_context max_chunk_size max_response_tokens
    user_secret_key user_algorithm

    backend_type type architectures device batch_size sched_strategy page_size memory_gpu_only
    utilization_percentage cpu_memory_size_GB kvc2_config_dir web web_cross_domain db_type db_host db_port
    db_name db_pool_size db_database backup_count file_upload_dir assistant_store_dir prompt_file
    """.split()  # noqa: SIM905
)


def split_ignored(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the flags without effect, and their values, out of a command line.

    Returns (the rest with every flag in kebab-case, the flags taken out).
    """
    rest: list[str] = []
    ignored: list[str] = []
    skip_value = False
    for argument in argv:
        if not argument.startswith("--"):
            if not skip_value:
                rest.append(argument)
            skip_value = False
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        skip_value = name in IGNORED and not equals
        if name in IGNORED:
            ignored.append(name)
        else:
            rest.append(name + equals + value)
    return rest, ignored

"""What options of other servers are called here, for who comes from them with a command line."""

from __future__ import annotations

OURS = {
    # vLLM's
    "--allowed-origins": "--cors-origin",
    "--block-size": "--page-size",
    "--generation-config": "--sampling-defaults",
    "--gpu-memory-utilization": "--kv-tokens",
    "--kv-cache-memory-bytes": "--kv-tokens",
    "--kv-offloading-size": "--dram-tokens",
    "--max-num-batched-tokens": "--max-batch-tokens",
    "--max-num-seqs": "--max-batch-size",
    "--num-gpu-blocks-override": "--kv-tokens",
    "--scheduling-policy": "--policy",
    "--served-model-name": "--model-name",
    "--ssl-certfile": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
    "--swap-space": "--dram-tokens",
    "--tool-call-parser": "--tool-parser",
    # SGLang's
    "--chunked-prefill-size": "--max-batch-tokens",
    "--context-length": "--max-model-len",
    "--hicache-size": "--dram-tokens",
    "--max-running-requests": "--max-batch-size",
    "--max-total-tokens": "--kv-tokens",
    "--mem-fraction-static": "--kv-tokens",
    "--model-path": "--model",
    "--schedule-policy": "--policy",
}

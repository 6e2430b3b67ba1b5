"""superinfer: LLM programs served to a deadline.

Names are loaded when first used, so that `import superinfer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "superinfer.errors": (
        "DeadlineMissedError", "EngineDeadError", "EngineUnavailableError", "InvalidRequestError", "ModelLoadError",
        "NonFiniteError", "OutputError", "OverloadedError", "ProtocolError", "QueueFullError", "RequestCancelledError",
        "SuperinferError", "UnsupportedError",
    ),
    "superinfer.lang.anthropic_backend": ("Anthropic",),
    "superinfer.lang.api": (
        "assistant", "assistant_begin", "assistant_end", "gen", "gen_int", "gen_string", "image", "select",
        "separate_reasoning", "system", "system_begin", "system_end", "tool", "tool_begin", "tool_end", "tools",
        "user", "user_begin", "user_end", "video",
    ),
    "superinfer.lang.backend": (
        "Backend",
        "Runtime", "RuntimeEndpoint", "default_backend", "flush_cache", "set_default_backend",
    ),
    "superinfer.lang.choices": (
        "greedy_token_selection", "token_length_normalized", "unconditional_likelihood_normalized",
    ),
    "superinfer.lang.engine": ("Engine",),
    "superinfer.lang.callgraph": ("CallGraph",),
    "superinfer.lang.history": ("History",),
    "superinfer.lang.litellm_backend": ("LiteLLM",),
    "superinfer.lang.openai_backend": ("OpenAI",),
    "superinfer.lang.plan": ("PlannedCall", "ProgramPlan"),
    "superinfer.lang.program": ("Function", "function"),
    "superinfer.lang.report": ("CallReport", "SLOReport"),
    "superinfer.lang.session": ("Reply", "Session"),
    "superinfer.lang.state": ("ProgramState", "ProgramStateGroup"),
    "superinfer.lang.tool_run": ("ToolResult", "acall_tools", "call_tools"),
    "superinfer.lang.tools": ("ToolCall", "tool_calls"),
    "superinfer.runtime.config": ("EngineConfig",),
    "superinfer.runtime.slo": ("SLO",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("superinfer.version").version()
    if name in ("errors", "lang", "runtime"):
        return import_module(f"superinfer.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'superinfer' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from superinfer.errors import (
        DeadlineMissedError as DeadlineMissedError,
    )
    from superinfer.errors import (
        EngineDeadError as EngineDeadError,
    )
    from superinfer.errors import (
        EngineUnavailableError as EngineUnavailableError,
    )
    from superinfer.errors import (
        InvalidRequestError as InvalidRequestError,
    )
    from superinfer.errors import (
        ModelLoadError as ModelLoadError,
    )
    from superinfer.errors import (
        NonFiniteError as NonFiniteError,
    )
    from superinfer.errors import (
        OutputError as OutputError,
    )
    from superinfer.errors import (
        OverloadedError as OverloadedError,
    )
    from superinfer.errors import (
        ProtocolError as ProtocolError,
    )
    from superinfer.errors import (
        QueueFullError as QueueFullError,
    )
    from superinfer.errors import (
        RequestCancelledError as RequestCancelledError,
    )
    from superinfer.errors import (
        SuperinferError as SuperinferError,
    )
    from superinfer.errors import (
        UnsupportedError as UnsupportedError,
    )
    from superinfer.lang.anthropic_backend import (
        Anthropic as Anthropic,
    )
    from superinfer.lang.api import (
        assistant as assistant,
    )
    from superinfer.lang.api import (
        assistant_begin as assistant_begin,
    )
    from superinfer.lang.api import (
        assistant_end as assistant_end,
    )
    from superinfer.lang.api import (
        gen as gen,
    )
    from superinfer.lang.api import (
        gen_int as gen_int,
    )
    from superinfer.lang.api import (
        gen_string as gen_string,
    )
    from superinfer.lang.api import (
        image as image,
    )
    from superinfer.lang.api import (
        select as select,
    )
    from superinfer.lang.api import (
        separate_reasoning as separate_reasoning,
    )
    from superinfer.lang.api import (
        system as system,
    )
    from superinfer.lang.api import (
        system_begin as system_begin,
    )
    from superinfer.lang.api import (
        system_end as system_end,
    )
    from superinfer.lang.api import (
        tool as tool,
    )
    from superinfer.lang.api import (
        tool_begin as tool_begin,
    )
    from superinfer.lang.api import (
        tool_end as tool_end,
    )
    from superinfer.lang.api import (
        tools as tools,
    )
    from superinfer.lang.api import (
        user as user,
    )
    from superinfer.lang.api import (
        user_begin as user_begin,
    )
    from superinfer.lang.api import (
        user_end as user_end,
    )
    from superinfer.lang.api import (
        video as video,
    )
    from superinfer.lang.backend import (
        Backend as Backend,
    )
    from superinfer.lang.backend import (
        Runtime as Runtime,
    )
    from superinfer.lang.backend import (
        RuntimeEndpoint as RuntimeEndpoint,
    )
    from superinfer.lang.backend import (
        default_backend as default_backend,
    )
    from superinfer.lang.backend import (
        flush_cache as flush_cache,
    )
    from superinfer.lang.backend import (
        set_default_backend as set_default_backend,
    )
    from superinfer.lang.callgraph import (
        CallGraph as CallGraph,
    )
    from superinfer.lang.choices import (
        greedy_token_selection as greedy_token_selection,
    )
    from superinfer.lang.choices import (
        token_length_normalized as token_length_normalized,
    )
    from superinfer.lang.choices import (
        unconditional_likelihood_normalized as unconditional_likelihood_normalized,
    )
    from superinfer.lang.engine import (
        Engine as Engine,
    )
    from superinfer.lang.history import (
        History as History,
    )
    from superinfer.lang.litellm_backend import (
        LiteLLM as LiteLLM,
    )
    from superinfer.lang.openai_backend import (
        OpenAI as OpenAI,
    )
    from superinfer.lang.plan import (
        PlannedCall as PlannedCall,
    )
    from superinfer.lang.plan import (
        ProgramPlan as ProgramPlan,
    )
    from superinfer.lang.program import (
        Function as Function,
    )
    from superinfer.lang.program import (
        function as function,
    )
    from superinfer.lang.report import (
        CallReport as CallReport,
    )
    from superinfer.lang.report import (
        SLOReport as SLOReport,
    )
    from superinfer.lang.session import (
        Reply as Reply,
    )
    from superinfer.lang.session import (
        Session as Session,
    )
    from superinfer.lang.state import (
        ProgramState as ProgramState,
    )
    from superinfer.lang.state import (
        ProgramStateGroup as ProgramStateGroup,
    )
    from superinfer.lang.tool_run import (
        ToolResult as ToolResult,
    )
    from superinfer.lang.tool_run import (
        acall_tools as acall_tools,
    )
    from superinfer.lang.tool_run import (
        call_tools as call_tools,
    )
    from superinfer.lang.tools import (
        ToolCall as ToolCall,
    )
    from superinfer.lang.tools import (
        tool_calls as tool_calls,
    )
    from superinfer.runtime.config import (
        EngineConfig as EngineConfig,
    )
    from superinfer.runtime.slo import (
        SLO as SLO,
    )

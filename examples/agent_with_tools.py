"""A shop assistant that looks prices up and calculates, over several turns and to a deadline.

    python examples/agent_with_tools.py

The whole conversation has 60 seconds; each call of the model is sent what is then left of them. The report at the end
says for each call what it was promised and what became of it.
"""

import ast
import operator

import superinfer as si

PRICES = {"price of lamp": "9", "price of chair": "40"}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return ast.literal_eval(node)

    return str(value(ast.parse(expression, mode="eval").body))


def lookup(key: str) -> str:
    """Look up a fact by its key."""
    return PRICES.get(key, "not found")


TOOLS = {"calculator": calculator, "lookup": lookup}


@si.function(deadline=60.0)
def shop_assistant(s, questions):
    """Answer each question, calling tools until the model answers in words."""
    s += si.tools(list(TOOLS.values()))
    s += si.system("You are a support agent.")
    for i, question in enumerate(questions):
        s += si.user(question)
        print(f"Customer:  {question}")
        for _ in range(6):
            s += si.assistant(si.gen(f"turn {i}", max_tokens=64, temperature=0, slo=si.SLO(ttft=5.0)))
            calls = si.tool_calls(s[f"turn {i}"])
            if not calls:
                break
            for call in calls:
                result = TOOLS[call.name](**call.arguments)
                print(f"           {call.name}({', '.join(call.arguments.values())}) = {result}")
                s += si.tool(result)
        print(f"Assistant: {s[f'turn {i}']}\n")


def main() -> None:
    """One conversation and its report."""
    with si.default_backend():
        state = shop_assistant.run(["How much are 12 lamps?", "And 30 of them?", "What does the chair cost?"])
        print(state.slo_report())


if __name__ == "__main__":
    main()

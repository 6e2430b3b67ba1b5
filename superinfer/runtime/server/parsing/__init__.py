"""What a model's text means: reasoning, content and tool calls, told apart while the text still comes.

`families.py` is the table that says which formats a model speaks.
"""

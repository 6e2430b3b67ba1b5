"""`superinfer bench …`: measuring a server under load, an engine, its kernels. The commands are in `commands.py`."""

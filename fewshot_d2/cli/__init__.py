"""The command ``fewshot-d2``: one module a subcommand, each with ``add_parser`` and ``run``; no logic of their own."""

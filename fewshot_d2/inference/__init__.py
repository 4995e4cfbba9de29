"""A user's own pictures: where they come from, supports to search them with, what is found and how good it is.

Nothing here knows a system; all of them are reached through ``FewShotPredictor``.
"""

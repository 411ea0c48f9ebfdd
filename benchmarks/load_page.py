from typing import Any


def page(stored: dict[str, Any]) -> str:
    return ""

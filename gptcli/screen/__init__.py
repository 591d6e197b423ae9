"""What `gpt train` shows: the plan, the live display, and the summary at the end."""

from gptcli.screen.live import TrainScreen
from gptcli.screen.planned import show_plan, show_time
from gptcli.screen.summary import say_next, summary_text

__all__ = ["TrainScreen", "say_next", "show_plan", "show_time", "summary_text"]

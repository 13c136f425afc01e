"""Where events go: lines on standard output or in a file, a command of the user's, an MQTT broker.

A :class:`Sink` may block and may fail; a :class:`Fanout` keeps both away from listening. ``sinks.mqtt`` is imported
by itself, because it needs a library that most listeners do without.
"""

from edge_runtime.sinks.command import CommandSink
from edge_runtime.sinks.fanout import Fanout, Sink
from edge_runtime.sinks.lines import FileSink, LineSink, text_line

__all__ = ["CommandSink", "Fanout", "FileSink", "LineSink", "Sink", "text_line"]

"""Fixture: the chat server as a teacher."""

from __future__ import annotations

import pytest
from inference.chat_server import ChatLog
from synthesis.made import teach


@pytest.fixture
def log(log: ChatLog) -> ChatLog:
    log.answer = teach
    return log

# SPDX-License-Identifier: Apache-2.0
from tests.backends import backend

__all__ = ["backend"]

# SPDX-License-Identifier: Apache-2.0
"""`python -m cumo` is `cumo`."""

import sys

from cumo.cli import main

sys.exit(main())

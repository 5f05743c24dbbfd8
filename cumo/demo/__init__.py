# SPDX-License-Identifier: Apache-2.0
"""`cumo demo`: the whole pipeline, small, from pictures of handwritten digits to a report, on any machine."""

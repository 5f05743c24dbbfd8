# SPDX-License-Identifier: Apache-2.0
"""A server for a trained model: OpenAI's chat API, and a page that also shows where the patches of a picture went."""

"""The use cases, one file a group of commands: what the command line calls and notebooks import.

Functions here import the rooms that need torch or the Hub's client when they are called.
"""

"""Schedules: functions of time with hypers of their own.

May import: core.
"""

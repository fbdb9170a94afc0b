"""May this day be trained on?"""

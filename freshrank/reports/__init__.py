"""Pages and figures: they show what was judged and judge nothing."""

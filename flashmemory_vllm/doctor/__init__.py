"""What a machine offers this package: each check reads or measures one thing and says what to do about it."""

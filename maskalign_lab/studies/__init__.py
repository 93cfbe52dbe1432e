"""What only one study needs, a folder each; and the runs that ship."""

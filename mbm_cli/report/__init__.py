"""What a person looks at: tables, progress and pictures. Only the command line imports it."""

"""The gRPC contract between router and workers. `make proto` makes the stubs from worker.proto."""

"""The `kvferry` command. Nothing heavy is imported before a command needs it, so that help is quick."""

from importlib.metadata import version as installed_version

import typer

from kvferry.cli import demo, keys, roles, serve, tenants

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve language models with prefill and decode on separate processes, and the KV in a shared block store.",
)
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.command("serve", epilog="Example: kvferry serve demo --port 8000 --store-size 4GiB")(serve.serve)
app.command("demo", epilog="Example: kvferry demo --model Qwen/Qwen2.5-0.5B-Instruct")(demo.demo)
app.command("store", epilog="Example: kvferry store --socket /run/kvferry/store.sock --size 4GiB")(roles.store)
app.command(
    "prefill", epilog="Example: kvferry prefill Qwen/Qwen2.5-0.5B --listen unix:/run/kvferry/p0 --store /run/kvferry/s"
)(roles.worker_command("prefill"))
app.command(
    "decode", epilog="Example: kvferry decode Qwen/Qwen2.5-0.5B --listen unix:/run/kvferry/d0 --store /run/kvferry/s"
)(roles.worker_command("decode"))
app.command(
    "router",
    epilog="Example: kvferry router --model Qwen/Qwen2.5-0.5B --prefill unix:/run/kvferry/p0 "
    "--decode unix:/run/kvferry/d0 --store /run/kvferry/s",
)(roles.router)


@app.command(epilog="Example: kvferry version")
def version() -> None:
    """Print the version."""
    print(installed_version("kvferry"))

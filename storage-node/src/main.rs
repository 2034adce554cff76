//! `lamina-storage-node`: arguments, logs, and which part of the library runs.

use clap::Parser;
use lamina_storage_node::args::{Cli, Command, LogFormat};
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => {
            start_logs(args.log_format);
            lamina_storage_node::serve(*args)?;
        }
        Command::Inspect(args) => {
            start_logs(LogFormat::Text);
            let equal = lamina_storage_node::inspect(&args, &mut std::io::stdout().lock())?;
            anyhow::ensure!(equal, "copies of a volume differ");
        }
    }
    Ok(())
}

fn start_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
}

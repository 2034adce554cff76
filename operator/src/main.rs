//! `lamina-operator`: keeps the maps of volumes, over Kubernetes or over a directory of files.
//!
//! Arguments, wiring, loop; nothing is decided here.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod ask;
mod serve;

/// Replicated block storage: the part that decides where data lies and who may use it.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "Without Kubernetes:
  lamina-operator serve --directory /var/lib/lamina/operator &
  lamina-operator server add a --control 127.0.0.1:4701
  lamina-operator policy create two --copies 2
  lamina-operator volume create db --size 10Gi --policy two
  lamina-operator volume attach db --node $(hostname)
Sizes: Ki, Mi, Gi, Ti (powers of 1024), k, M, G, T (powers of 1000), or plain bytes.";

#[derive(Subcommand)]
enum Verb {
    /// Serve: keep the maps of volumes, until SIGTERM or SIGINT.
    Serve(serve::Arguments),
    /// Volumes of an operator that serves a directory.
    #[command(subcommand)]
    Volume(ask::Volume),
    /// Storage servers of an operator that serves a directory.
    #[command(subcommand)]
    Server(ask::Server),
    /// Replication policies of an operator that serves a directory.
    #[command(subcommand)]
    Policy(ask::Policy),
}

fn main() -> ExitCode {
    let Arguments { verb } = Arguments::parse();
    let result = runtime_for(&verb).map_err(anyhow::Error::from).and_then(|runtime| {
        let result = runtime.block_on(async {
            match verb {
                Verb::Serve(arguments) => serve::run(arguments).await,
                Verb::Volume(verb) => ask::volume(verb).await,
                Verb::Server(verb) => ask::server(verb).await,
                Verb::Policy(verb) => ask::policy(verb).await,
            }
        });
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(code) => code,
        Err(why) => {
            eprintln!("lamina-operator: {why:#}");
            ExitCode::FAILURE
        }
    }
}

/// Many threads where an API server with many objects is watched. Over a directory one does all: handing work from thread
/// to thread is most of what idle volumes would cost there.
fn runtime_for(verb: &Verb) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = match verb {
        Verb::Serve(arguments) if arguments.over_kubernetes() => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    builder.enable_all().build()
}

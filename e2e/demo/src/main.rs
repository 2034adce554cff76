//! `lamina-demo`: arguments, one call, what it says.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use lamina_cluster::Cluster;
use lamina_demo::commits::database;
use lamina_demo::run::{self, Ground, Places};
use lamina_demo::say::Teller;
use lamina_demo::{check, kube, log};

const EXAMPLES: &str = "Examples:
  lamina-demo run                      a Kubernetes, PostgreSQL on a 2-copy volume, servers killed, nothing lost
  lamina-demo run --keep               the story again on the cluster of the run before
  KUBECONFIG=~/.kube/config lamina-demo run --existing     on a cluster of yours
  lamina-demo check --log commits.log  is every logged commit in the database?
  lamina-demo clean                    removes the cluster, its state and the images

Needs root. State is kept in ~/.local/state/lamina/demo (LAMINA_DEMO_DIR), caches in ~/.cache/lamina (LAMINA_CACHE).";

/// Lamina at work: a storage server is killed under a database, and nothing is lost.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the whole demo; ends with status 1 at the first miss and leaves the cluster up
    Run {
        /// How many nodes run pods and storage servers
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=9))]
        nodes: u8,
        /// The story again on the cluster and the programs of an earlier run, as they are
        #[arg(long, conflicts_with = "existing")]
        keep: bool,
        /// On the cluster that KUBECONFIG names: Lamina is installed there with a 2 GiB file on each node, and stays. Its
        /// nodes must have the images (`lamina-cluster build-image`)
        #[arg(long, requires = "kubeconfig")]
        existing: bool,
        /// The kubeconfig of that cluster
        #[arg(long, env = "KUBECONFIG")]
        kubeconfig: Option<PathBuf>,
    },
    /// Look up every commit of a log in the database; ends with status 1 if one is missing or differs
    Check {
        /// Lines `client n milliseconds`, such as `run` writes
        #[arg(long)]
        log: PathBuf,
        /// Address of PostgreSQL [default: the demo's pod]
        #[arg(long)]
        host: Option<String>,
    },
    /// Remove the cluster, its state and the built images
    Clean {
        /// Also the programs of Kubernetes and Debian's packages, which take 10 minutes to build again
        #[arg(long)]
        caches: bool,
    },
}

fn main() -> ExitCode {
    match act(Arguments::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lamina-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(verb: Verb) -> Result<ExitCode> {
    let places = Places::usual()?;
    match verb {
        Verb::Run { nodes, keep, existing, kubeconfig } => {
            let ground = match kubeconfig.filter(|_| existing) {
                Some(kubeconfig) => Ground::Existing(kubeconfig),
                None if keep => Ground::Kept,
                None => Ground::Own(nodes),
            };
            run::run(&places, &ground, &Teller::new())
                .with_context(|| format!("the cluster is left as it is in {}", places.cluster.display()))?;
        }
        Verb::Check { log, host } => return judge(&places, &log, host),
        Verb::Clean { caches } => clean(&places, caches)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn judge(places: &Places, file: &std::path::Path, host: Option<String>) -> Result<ExitCode> {
    let host = match host {
        Some(host) => host,
        None => kube::pod(&Cluster::open(&places.cluster)?, "default", "postgres-0")?.status.pod_ip,
    };
    let verdict = check::check(&log::read(file)?, &database(&host))?;
    println!("{}", verdict.in_words());
    Ok(if verdict.passes() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn clean(places: &Places, caches: bool) -> Result<()> {
    let teller = Teller::new();
    Cluster::down(&places.cluster, &|line| teller.say(line))?;
    let mut folders: Vec<PathBuf> = places.log.parent().map(PathBuf::from).into_iter().collect();
    let cache = lamina_cluster::layout::cache_dir();
    folders.extend(cache.map(|cache| if caches { cache } else { cache.join("images") }));
    for folder in folders {
        match std::fs::remove_dir_all(&folder) {
            Ok(()) => teller.say(format_args!("removed {}", folder.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| folder.display().to_string()),
        }
        // The folder around it goes too if nothing else is in it.
        folder.parent().map(std::fs::remove_dir);
    }
    Ok(())
}

//! `lamina-cluster`: a real Kubernetes on this machine, from the command line. Arguments, one call, what it says.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use lamina_cluster::image::{self, Recipe};
use lamina_cluster::{Cluster, Layout, NodeId, Tools, process};

const EXAMPLES: &str = "Examples:
  e2e/cluster/build-tools.sh                 build the programs once (10 to 20 minutes)
  lamina-cluster up --nodes 3                etcd, control plane and three nodes, Ready in about 20 s
  lamina-cluster kubectl -- get nodes -o wide
  export KUBECONFIG=$(lamina-cluster kubeconfig)
  lamina-cluster build-image --preset postgres -o postgres.tar
  lamina-cluster build-image --name lamina.dev/lamina:dev --preset storage-tools --deb libgcc-s1 \
      --bin target/release/lamina-operator:/usr/bin/lamina-operator \
      --bin target/release/lamina-storage-node:/usr/bin/lamina-storage-node \
      --bin target/release/lamina-csi-node:/usr/bin/lamina-csi-node -o lamina.tar
  lamina-cluster image postgres.tar          into all nodes
  lamina-cluster cut n1 n2                   n1 and n2 see only each other; `heal` undoes it
  lamina-cluster kill-node n2                as a power cut; `restart-node n2` switches it on
  lamina-cluster signal n1 kubelet STOP      freezes a kubelet; CONT lets it go on
  lamina-cluster signal-pod -n lamina lamina-storage-node-x7k2p KILL
  lamina-cluster down                        removes everything

Needs root. It writes to its state directory and its cache; it makes network namespaces, cgroups and one veth
interface, all named lamina<slot>-…; while it is up, the kubelet's machine-wide sysctls are in force.";

/// A real Kubernetes on this machine, for tests and the demo.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    /// State directory [default: $XDG_STATE_HOME/lamina/cluster or ~/.local/state/lamina/cluster]
    #[arg(long, global = true, env = "LAMINA_CLUSTER_DIR")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring the cluster up, or mend it; returns when all nodes are Ready
    Up {
        /// How many nodes run pods
        #[arg(long, default_value_t = 3)]
        nodes: u8,
    },
    /// Remove everything that `up` made, also after a crash
    Down,
    /// Show places, daemons, memory and network
    Status,
    /// Print the path of the administrator's kubeconfig
    Kubeconfig,
    /// Run kubectl as administrator
    Kubectl {
        /// Arguments of kubectl, after `--`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Take OCI tars into all nodes
    Image {
        /// Files that `build-image` wrote
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Build an image as an OCI tar
    BuildImage(ImageArguments),
    /// Cut nodes off from everyone but each other
    Cut {
        /// n1, n2 …
        #[arg(required = true)]
        nodes: Vec<NodeId>,
    },
    /// Undo `cut`, for these nodes or for all
    Heal {
        /// n1, n2 …
        nodes: Vec<NodeId>,
    },
    /// Switch a node off as a power cut does
    KillNode {
        /// n1, n2 …
        node: NodeId,
    },
    /// Switch a node on again (off first if it is on) and wait until it is Ready
    RestartNode {
        /// n1, n2 …
        node: NodeId,
    },
    /// Send a signal to a node's kubelet or containerd
    Signal {
        /// n1, n2 …
        node: NodeId,
        /// kubelet or containerd
        daemon: String,
        /// STOP, CONT, TERM or KILL
        signal: String,
    },
    /// Send a signal to all processes of a pod's containers, past Kubernetes
    SignalPod {
        /// Its namespace
        #[arg(short, long, default_value = "default")]
        namespace: String,
        /// Its name
        pod: String,
        /// STOP, CONT, TERM or KILL
        signal: String,
    },
    /// Run a program in a node's namespaces
    Enter {
        /// n1, n2 …
        node: NodeId,
        /// Program and arguments, after `--`; a shell if none
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// The sandbox image of every pod
    Pause,
    /// A shell and small tools
    Busybox,
    /// PostgreSQL 15 with pgbench and pg_amcheck
    Postgres,
    /// e2fsprogs, xfsprogs, mount, losetup, busybox
    StorageTools,
}

#[derive(Args)]
struct ImageArguments {
    /// Start from a ready recipe; the options below add to it
    #[arg(long)]
    preset: Option<Preset>,
    /// Name with tag, such as lamina.dev/operator:dev; with --preset in place of its own
    #[arg(long, required_unless_present = "preset")]
    name: Option<String>,
    /// Add busybox with links for its tools
    #[arg(long)]
    from_busybox: bool,
    /// Add a file of this machine at an absolute path, executable
    #[arg(long, value_name = "PATH:DEST")]
    bin: Vec<String>,
    /// Add a Debian package with its dependencies
    #[arg(long, value_name = "PACKAGE")]
    deb: Vec<String>,
    /// Leave a package out though others depend on it (one * allowed)
    #[arg(long, value_name = "PACKAGE")]
    without: Vec<String>,
    /// Program and arguments to run by default
    #[arg(long, num_args = 1.., value_name = "WORD")]
    entrypoint: Vec<String>,
    /// Where to write the tar
    #[arg(short, long, value_name = "FILE.tar")]
    output: PathBuf,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lamina-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let dir = match arguments.dir {
        Some(dir) => dir,
        None => Layout::default_dir()?,
    };
    match arguments.verb {
        Verb::Up { nodes } => up(dir, nodes),
        Verb::Down => Ok(Cluster::down(&dir, &say)?),
        Verb::BuildImage(wanted) => build_image(wanted),
        other => with_cluster(&Cluster::open(&dir)?, other),
    }
}

fn up(dir: PathBuf, nodes: u8) -> Result<()> {
    let start = std::time::Instant::now();
    let cluster = Cluster::up(dir, &Tools::find()?, nodes, &say)?;
    say(&format!("{nodes} nodes Ready after {:.1} s", start.elapsed().as_secs_f64()));
    println!("export KUBECONFIG={}", cluster.kubeconfig().display());
    Ok(())
}

fn with_cluster(cluster: &Cluster, verb: Verb) -> Result<()> {
    match verb {
        Verb::Up { .. } | Verb::Down | Verb::BuildImage(_) => unreachable!("handled without an open cluster"),
        Verb::Status => print!("{}", cluster.status()?),
        Verb::Kubeconfig => println!("{}", cluster.kubeconfig().display()),
        Verb::Kubectl { args } => {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            become_program(&cluster.kubectl_words(&args))?;
        }
        Verb::Image { files } => {
            for file in &files {
                say(&format!("importing {}", file.display()));
                cluster.import_image(file)?;
            }
        }
        Verb::Cut { nodes } => cluster.cut(&nodes)?,
        Verb::Heal { nodes } => cluster.heal(&nodes)?,
        Verb::KillNode { node } => cluster.kill_node(node)?,
        Verb::RestartNode { node } => cluster.restart_node(node, &say)?,
        Verb::Signal { node, daemon, signal } => cluster.signal(node, &daemon, &signal)?,
        Verb::SignalPod { namespace, pod, signal } => {
            let count = cluster.signal_pod(&namespace, &pod, &signal)?;
            say(&format!("{signal} sent to {count} processes"));
        }
        Verb::Enter { node, argv } => {
            let enter = process::node_namespaces(cluster.layout(), node)?;
            let argv = if argv.is_empty() { vec!["sh".to_owned()] } else { argv };
            become_program(&[vec!["nsenter".to_owned()], enter, argv].concat())?;
        }
    }
    Ok(())
}

fn build_image(wanted: ImageArguments) -> Result<()> {
    let base = match wanted.preset {
        Some(Preset::Pause) => image::pause(),
        Some(Preset::Busybox) => image::busybox(),
        Some(Preset::Postgres) => image::postgres(),
        Some(Preset::StorageTools) => image::storage_tools(),
        None => Recipe::default(),
    };
    let base = match &wanted.name {
        Some(name) => base.named(name),
        None => base,
    };
    let mut recipe = base.with_debs(wanted.deb).without_debs(wanted.without);
    if wanted.from_busybox {
        recipe = recipe.with_busybox();
    }
    if !wanted.entrypoint.is_empty() {
        recipe = recipe.with_entrypoint(wanted.entrypoint);
    }
    for bin in &wanted.bin {
        recipe = recipe.with_bin_text(bin)?;
    }
    recipe.build(&wanted.output)?;
    say(&format!("{} is in {}", recipe.name(), wanted.output.display()));
    Ok(())
}

fn become_program(argv: &[String]) -> Result<()> {
    let error = Command::new(&argv[0]).args(&argv[1..]).exec();
    Err(error).with_context(|| argv.join(" "))
}

fn say(line: &str) {
    eprintln!("lamina-cluster: {line}");
}

//! Arguments → wiring → loop.

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use lamina_csi_api::name::NodeName;
use lamina_csi_node::device::DeviceKind;
use lamina_csi_node::export::Listen;
use lamina_csi_node::holder::Holder;
use lamina_csi_node::{export, serve};
use lamina_protocol::ids::{ClusterId, SessionId, VolumeId};
use lamina_protocol::wire::Start;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

const EXAMPLES: &str = "\
Examples:
  Serve volumes to pods (as the DaemonSet does):
    lamina-csi-node serve --node n1 --cluster $LAMINA_CLUSTER --namespace lamina-system \\
        --csi-endpoint /var/lib/kubelet/plugins/csi.lamina.dev/csi.sock --holder /run/lamina/holder.sock
  Keep device descriptors while csi-node restarts:
    lamina-csi-node device-holder --socket /run/lamina/holder.sock
  Export a volume over NBD without Kubernetes:
    lamina-csi-node export --cluster $C --volume $V --session $S --leader 127.0.0.1:4710 \\
        --listen unix:///tmp/v.sock
    nbdinfo 'nbd+unix:///?socket=/tmp/v.sock'";

#[derive(Parser)]
#[command(name = "lamina-csi-node", version, about = "Lamina on a node: block devices for pods", after_help = EXAMPLES)]
struct Cli {
    /// What to log, such as info or lamina_csi_node=debug.
    #[arg(long, env = "LAMINA_LOG", default_value = "info", global = true)]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the CSI node service and the volumes of this node.
    Serve(Serve),
    /// Keep the kernel's device descriptors for csi-node, while it restarts.
    DeviceHolder(DeviceHolder),
    /// Export a volume over NBD, without Kubernetes.
    #[command(after_help = EXAMPLES)]
    Export(Export),
}

#[derive(Args)]
struct Serve {
    /// Name of this node's Node object.
    #[arg(long, env = "NODE_NAME")]
    node: NodeName,
    /// The cluster's id: 32 hexadecimal digits.
    #[arg(long, env = "LAMINA_CLUSTER")]
    cluster: ClusterId,
    /// Namespace of the operator and its Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "lamina-system")]
    namespace: String,
    /// The CSI socket; records of attached volumes are kept beside it.
    #[arg(long, default_value = "/var/lib/kubelet/plugins/csi.lamina.dev/csi.sock")]
    csi_endpoint: PathBuf,
    /// Where the kubelet looks for plugins.
    #[arg(long, default_value = "/var/lib/kubelet/plugins_registry")]
    registration_dir: PathBuf,
    /// The kubelet's directory; must be mounted here at the same path with propagation in both directions.
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// Socket of the device holder; without one a restart of this program costs its volumes I/O errors.
    #[arg(long)]
    holder: Option<PathBuf>,
    /// How volumes become devices: auto or fuse (nbd and ublk come later and answer so).
    #[arg(long, default_value = "auto")]
    device: DeviceKind,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, default_value = "127.0.0.1:4792")]
    metrics: SocketAddr,
    /// Volumes that may be attached to this node at a time.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_volumes: u32,
}

#[derive(Args)]
struct DeviceHolder {
    /// Where to listen.
    #[arg(long)]
    socket: PathBuf,
}

#[derive(Args)]
struct Export {
    /// The cluster's id: 32 hexadecimal digits.
    #[arg(long, env = "LAMINA_CLUSTER")]
    cluster: ClusterId,
    /// The volume's id: 32 hexadecimal digits.
    #[arg(long)]
    volume: VolumeId,
    /// The session's id, one that the operator has admitted.
    #[arg(long)]
    session: SessionId,
    /// The session was used before, by a process that answered all that it was asked.
    #[arg(long)]
    resume: bool,
    /// host:port of the operator.
    #[arg(long)]
    leader: String,
    /// tcp://ADDRESS:PORT or unix:///PATH.
    #[arg(long, default_value = "tcp://127.0.0.1:10809")]
    listen: Listen,
    /// Name of the export; clients that name none get it too.
    #[arg(long, default_value = "volume")]
    name: String,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&cli.log).context("--log")?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    end_at_a_panic();
    let mut runtime = match cli.command {
        // Its requests are served on the driver's thread; what is left is seldom.
        Command::Export(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(run(cli.command));
    if let Err(error) = &result {
        eprintln!("Error: {error:#}");
    }
    // At once, with everything in place: a driver that is taken down in order answers the kernel with errors, one
    // that is gone leaves its requests to the successor.
    std::process::exit(i32::from(result.is_err()));
}

/// A broken invariant ends the whole process: a successor takes the devices over, half a process would let them hang.
fn end_at_a_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

async fn run(command: Command) -> anyhow::Result<()> {
    let shutdown = on_signal()?;
    match command {
        Command::Serve(options) => run_serve(options, shutdown).await,
        Command::DeviceHolder(DeviceHolder { socket }) => run_holder(socket, shutdown).await,
        Command::Export(options) => {
            let start = if options.resume { Start::Resume } else { Start::Fresh };
            let Export { cluster, volume, session, leader, listen, name, .. } = options;
            let options = export::Options { cluster, volume, session, start, leader, listen, name };
            Ok(export::export(options, shutdown).await?)
        }
    }
}

async fn run_serve(options: Serve, shutdown: watch::Receiver<bool>) -> anyhow::Result<()> {
    anyhow::ensure!(
        options.csi_endpoint.starts_with(&options.kubelet_dir),
        "--csi-endpoint must lie in --kubelet-dir ({}): devices are mounted beside it for the whole node",
        options.kubelet_dir.display()
    );
    let client = kube::Client::try_default().await.context("find the API server")?;
    let options = serve::Options {
        node: options.node,
        cluster: options.cluster,
        namespace: options.namespace,
        csi_endpoint: options.csi_endpoint,
        registration_dir: options.registration_dir,
        holder: options.holder,
        device: options.device,
        metrics: options.metrics,
        max_volumes: options.max_volumes,
    };
    Ok(Box::pin(serve::serve(options, client, shutdown)).await?)
}

async fn run_holder(socket: PathBuf, mut shutdown: watch::Receiver<bool>) -> anyhow::Result<()> {
    if let Some(parent) = socket.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    tokio::select! {
        served = Holder::new().serve_at(&socket) => served.with_context(|| format!("serve {}", socket.display())),
        _ = shutdown.wait_for(|end| *end) => Ok(()),
    }
}

/// Turns true at SIGTERM or SIGINT.
fn on_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let (end, ends) = watch::channel(false);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        end.send_replace(true);
        end.closed().await;
    });
    Ok(ends)
}

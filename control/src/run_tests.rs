//! One control process with a store of files and no nodes, asked over mutual TLS.

use std::net::SocketAddr;
use std::path::Path;

use domain::Reason;
use net::pki::{Ca, Validity};
use net::{Dialer, Expected};
use proto::status::reason_of;
use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::cluster_service_client::ClusterServiceClient;
use proto::v1::registry_service_client::RegistryServiceClient;
use proto::v1::work_service_client::WorkServiceClient;
use proto::v1::{self, SubmitRequest};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    ca: Ca,
    api: String,
    _stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), Error>>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn start() -> Self {
        net::install_crypto_provider();
        let dir = tempfile::tempdir().unwrap();
        let ca = net::pki::init(dir.path(), &"stagedoor.local".parse().unwrap()).unwrap();
        let config = config(&ca, dir.path());
        let identity = Identity::load(&config.net).unwrap();
        check_name(&config, &identity).unwrap();
        let process = Process::start(&config, &identity).await.unwrap();
        let api = process.listener.local_addr().to_string();
        let mut views = process.scheduler.views();
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            process.run(&config, stopped).await
        });
        let view = tokio::time::timeout(PATIENCE, views.wait_for(Option::is_some)).await;
        assert!(view.is_ok_and(|view| view.is_ok()), "no view came");
        Self { ca, api, _stop: stop, ended, _dir: dir }
    }

    async fn channel(&self, role_and_name: &str) -> Channel {
        let id = format!("spiffe://stagedoor.local/{role_and_name}").parse().unwrap();
        let issued = self.ca.issue(&id, Validity::default()).unwrap();
        let identity =
            Identity::from_pem(&issued.certificate_pem, &issued.key_pem, self.ca.certificate_pem());
        let dialer = Dialer::new(&identity.unwrap(), Protocol::Grpc);
        let connector = net::grpc::connector(dialer, Expected::any(Role::Control));
        let endpoint = Endpoint::from_shared(format!("http://{}", self.api)).unwrap();
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    async fn stop(self) {
        drop(self._stop);
        tokio::time::timeout(PATIENCE, self.ended).await.unwrap().unwrap().unwrap();
    }
}

fn config(ca: &Ca, dir: &Path) -> Config {
    let id = "spiffe://stagedoor.local/control/control-1".parse().unwrap();
    let leaf = ca.issue(&id, Validity::default()).unwrap().write(dir, "control").unwrap();
    let cookie = dir.join("cookie");
    std::fs::write(&cookie, "0123456789abcdef").unwrap();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let store = store::Config {
        engine: store::Engine::File,
        directory: dir.join("data"),
        ..store::Config::default()
    };
    Config {
        name: "control-1".parse().unwrap(),
        controls: Vec::new(),
        api: Api { listen: any, ..Api::default() },
        cluster: cluster::Config { listen: any, cookie, ..cluster::Config::default() },
        beat: Beat { listen: any, ..Beat::default() },
        net: net::Config { certificate: leaf.certificate, key: leaf.key, ca: dir.join("ca.crt") },
        telemetry: telemetry::Config::default(),
        stores: [("main".to_owned(), store)].into(),
        scheduler: scheduler::Config { shards: 4, ..scheduler::Config::default() },
    }
}

fn soon<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_millis(500));
    request
}

fn told(status: &Status) -> (Code, Option<Reason>) {
    (status.code(), reason_of(status))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_process_without_nodes_answers_what_it_can_and_says_what_is_missing() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel("client/ann").await;

    let mut cluster = ClusterServiceClient::new(channel.clone());
    let status = cluster.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.leader.unwrap().name, "control-1");
    assert_eq!((status.shards.len(), status.nodes.len()), (4, 0));
    let store = status.store.unwrap();
    assert!(store.reachable && store.url.starts_with("file:"), "{store:?}");
    let explain = |kind: &str, id: &str| v1::ExplainRequest { kind: kind.into(), id: id.into() };
    let wrong = cluster.explain(explain("planet", "mars")).await.unwrap_err();
    assert_eq!(told(&wrong).0, Code::InvalidArgument);

    let mut registry = RegistryServiceClient::new(channel.clone());
    let found =
        registry.find(v1::FindRequest { name: "phase/*".into(), ..Default::default() }).await;
    assert!(found.unwrap().into_inner().capabilities.is_empty());

    let mut works = WorkServiceClient::new(channel.clone());
    let submit = |agent: &str| SubmitRequest { agent: agent.into(), ..SubmitRequest::default() };
    let unknown = works.submit(submit("default/nobody/k")).await.unwrap_err();
    assert_eq!(told(&unknown), (Code::NotFound, Some(Reason::NotFound)));
    assert!(unknown.message().contains("nobody") && unknown.message().contains("apply"));
    let unowned = works.submit(soon(submit("default/postchain/k"))).await.unwrap_err();
    assert_eq!(told(&unowned), (Code::DeadlineExceeded, Some(Reason::Unowned)), "{unowned:?}");
    let list = v1::ListRequest { tenant: "default".into(), ..Default::default() };
    let unreachable = works.list(list).await.unwrap_err();
    assert_eq!(told(&unreachable), (Code::Unavailable, Some(Reason::Unowned)), "{unreachable:?}");
    assert!(proto::status::retry_after_of(&unreachable).is_some());

    let mut agents = AgentServiceClient::new(channel);
    let applied = v1::Definition { name: "support".into(), ..v1::Definition::default() };
    let apply =
        v1::ApplyDefinitionRequest { tenant: "default".into(), definition: Some(applied.clone()) };
    let other = v1::Definition { model: "oracle".into(), ..applied.clone() };
    let other = v1::ApplyDefinitionRequest { definition: Some(other), ..apply.clone() };
    let refused = agents.apply_definition(other).await.unwrap_err();
    assert_eq!(told(&refused).0, Code::InvalidArgument);
    let applied = agents.apply_definition(apply).await.unwrap().into_inner().version.unwrap();
    let list = v1::ListDefinitionsRequest { tenant: "default".into(), ..Default::default() };
    let list = agents.list_definitions(list).await.unwrap().into_inner();
    let names: Vec<_> =
        list.versions.iter().map(|one| one.definition.clone().unwrap().name).collect();
    assert_eq!(names, ["postchain", "support"]);
    assert_eq!(list.versions[1], applied);
    let unowned = works.submit(soon(submit("default/support/k"))).await.unwrap_err();
    assert_eq!(told(&unowned).0, Code::DeadlineExceeded);

    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_nodes_and_stores_may_not_call_the_api() {
    let fixture = Fixture::start().await;
    for role in ["node", "store"] {
        let channel = fixture.channel(&format!("{role}/{role}-1")).await;
        let mut cluster = ClusterServiceClient::new(channel);
        let refused = cluster.status(v1::StatusRequest {}).await.unwrap_err();
        assert_eq!(told(&refused), (Code::PermissionDenied, Some(Reason::NotAuthorised)));
        assert!(refused.message().contains(role), "{refused:?}");
    }
    fixture.stop().await;
}

#[tokio::test]
async fn a_config_and_a_certificate_that_differ_are_refused() {
    net::install_crypto_provider();
    let dir = tempfile::tempdir().unwrap();
    let ca = net::pki::init(dir.path(), &"stagedoor.local".parse().unwrap()).unwrap();
    let config = Config { name: "control-2".parse().unwrap(), ..config(&ca, dir.path()) };
    let error = Box::pin(run(config, std::future::pending())).await.unwrap_err();
    assert!(matches!(error, Error::Name { .. }), "{error}");
    assert!(error.to_string().contains("control/control-2"));
}

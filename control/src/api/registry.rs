//! What the processes of the cluster offer.

use domain::CapabilityName;
use proto::status::Failure;
use proto::v1::registry_service_server::RegistryService;
use proto::v1::{FindRequest, FindResponse};
use scheduler::Query;
use tonic::{Request, Response, Status};

use crate::edge;

pub(crate) struct Registry {
    pub(crate) scheduler: scheduler::Handle,
}

#[tonic::async_trait]
impl RegistryService for Registry {
    async fn find(&self, request: Request<FindRequest>) -> Result<Response<FindResponse>, Status> {
        let FindRequest { name, version_min, attributes } = request.into_inner();
        check_name(&name)?;
        let version_min = edge::count("version_min", version_min)?;
        let query = Query { name, version_min, attributes: attributes.into_iter().collect() };
        let capabilities = self.scheduler.find(query).await.map_err(Failure::from)?;
        Ok(Response::new(FindResponse { capabilities }))
    }
}

/// A name, the beginning of one and `*`, or nothing.
fn check_name(name: &str) -> Result<(), Failure> {
    let beginning = name.strip_suffix('*').unwrap_or(name);
    edge::optional::<CapabilityName>("name", beginning).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_be_whole_or_begun() {
        for name in ["", "*", "phase/action", "phase/*"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["Phase", "phase/*/x", "**"] {
            assert_eq!(check_name(name).unwrap_err().field.as_deref(), Some("name"), "{name}");
        }
    }
}

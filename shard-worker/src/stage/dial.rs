//! ● How a shard reaches the stages that it sends to: dialled until they let it in.

use std::time::Duration;

use shoal_protocol::activation::LinkHello;
use shoal_protocol::quic::{
    Alpn, Connection, Endpoint, Expect, FrameReceiver, FrameSender, close_code,
};

use super::door::{HELLO_TIMEOUT, read_hello, send_hello};
use super::ring::{LinkPlan, Neighbour};

/// The pause after the first failed dial; it doubles up to `REDIAL_PAUSE_MAX`. Neighbours load for
/// seconds to minutes, and nothing waits on a link that could be up.
const REDIAL_PAUSE_MIN: Duration = Duration::from_millis(20);

/// The longest pause between dials.
const REDIAL_PAUSE_MAX: Duration = Duration::from_millis(400);

/// Dials the next stage until it lets us in. The caller drops the future when the shard is withdrawn.
pub(super) async fn dial(
    endpoint: &Endpoint,
    plan: &LinkPlan,
    to: &Neighbour,
    of_ranks: bool,
) -> (Connection, FrameSender, FrameReceiver) {
    let mut pause = REDIAL_PAUSE_MIN;
    loop {
        match dial_once(endpoint, to, plan.hello_to(to, of_ranks)).await {
            Ok(link) => return link,
            Err(why) => tracing::debug!(
                replica = %plan.replica, generation = %plan.generation,
                "no link to {to} yet: {why}"
            ),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(REDIAL_PAUSE_MAX);
    }
}

async fn dial_once(
    endpoint: &Endpoint,
    to: &Neighbour,
    hello: LinkHello,
) -> Result<(Connection, FrameSender, FrameReceiver), String> {
    let connection = endpoint
        .connect(to.address, Expect::Node(to.node), Alpn::Activations, HELLO_TIMEOUT)
        .await
        .map_err(|error| error.to_string())?;
    let greet = async {
        let (mut sender, mut receiver) = connection.open_bi().await.map_err(|e| e.to_string())?;
        send_hello(&mut sender, &hello).await.map_err(|e| e.to_string())?;
        let answer = read_hello(&mut receiver).await.map_err(|e| e.to_string())?;
        if answer != hello.answer() {
            return Err(format!("it answered {answer:?}"));
        }
        Ok((sender, receiver))
    };
    match tokio::time::timeout(HELLO_TIMEOUT, greet).await {
        Ok(Ok((sender, receiver))) => Ok((connection, sender, receiver)),
        Ok(Err(why)) => {
            connection.close(close_code::PROTOCOL, "no LinkHello in answer");
            Err(why)
        }
        Err(_) => {
            connection.close(close_code::PROTOCOL, "no LinkHello in answer");
            Err(format!("no answer within {HELLO_TIMEOUT:?}"))
        }
    }
}

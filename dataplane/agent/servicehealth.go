// SPDX-License-Identifier: Apache-2.0

package agent

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/proxy"
	"k8s.io/kubernetes/pkg/proxy/healthcheck"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
)

// A serviceHealth tells load balancers over HTTP, on the health check node ports of Services with a local external policy, whether this
// node has endpoints for them: kube-proxy's own server, told what changed. Its methods are not to be called at the same time.
type serviceHealth struct {
	server  healthcheck.ServiceHealthServer
	ports   map[proxy.ServicePortName]uint16 // the ports of Services that have one
	changed bool
}

func newServiceHealth(cfg Config, family v1.IPFamily, status *status) *serviceHealth {
	return &serviceHealth{
		server: healthcheck.NewServiceHealthServer(cfg.NodeName, nil, proxyutil.NewNodePortAddresses(family, nil), status.health, family),
		ports:  make(map[proxy.ServicePortName]uint16),
	}
}

// portsChanged notes what a Service was and is.
func (h *serviceHealth) portsChanged(previous, current proxy.ServicePortMap) {
	for name := range previous {
		if _, has := h.ports[name]; has {
			delete(h.ports, name)
			h.changed = true
		}
	}
	for name, port := range current {
		if number := port.HealthCheckNodePort(); number != 0 {
			h.ports[name] = uint16(number)
			h.changed = true
		}
	}
}

// endpointsChanged notes that a port has other endpoints.
func (h *serviceHealth) endpointsChanged(name proxy.ServicePortName) {
	if _, has := h.ports[name]; has {
		h.changed = true
	}
}

// sync has the server answer by what is so now. It logs what it cannot listen on, and does not try that again before the next change.
func (h *serviceHealth) sync(endpoints proxy.EndpointsMap) error {
	if !h.changed {
		return nil
	}
	services, theirs := make(map[types.NamespacedName]uint16), make(proxy.EndpointsMap)
	for name, number := range h.ports {
		services[name.NamespacedName] = number
		theirs[name] = endpoints[name]
	}
	if err := h.server.SyncServices(services); err != nil {
		return err
	}
	if err := h.server.SyncEndpoints(theirs.LocalReadyEndpoints()); err != nil {
		return err
	}
	h.changed = false
	return nil
}

// close ends all answers.
func (h *serviceHealth) close() error { return h.server.SyncServices(nil) }

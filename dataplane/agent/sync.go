// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"
	"k8s.io/kubernetes/pkg/proxy/runner"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// A syncer turns what the informers see of an IP family into changes of the load balancer. Between syncs it remembers which ports
// changed, so that a sync looks at those alone.
type syncer struct {
	// Set once.
	family    v1.IPFamily
	nodeName  string
	balancer  *lb.Balancer
	status    *status
	runner    *runner.BoundedFrequencyRunner
	services  *proxy.ServiceChangeTracker
	endpoints *proxy.EndpointsChangeTracker

	// Guarded by mu.
	mu             sync.Mutex
	servicesSynced bool
	slicesSynced   bool
	topology       map[string]string
	ports          proxy.ServicePortMap
	endpointsOf    proxy.EndpointsMap
	changed        sets.Set[proxy.ServicePortName] // ports to look at in the next sync
	gone           sets.Set[lb.Frontend]           // frontends that a changed port had before
	noLocal        sets.Set[proxy.ServicePortName] // ports with a local policy and no local endpoint
	pruned         bool                            // whether a former agent's frontends were looked through
}

var (
	_ proxyconfig.ServiceHandler       = &syncer{}
	_ proxyconfig.EndpointSliceHandler = &syncer{}
	_ proxyconfig.NodeTopologyHandler  = &syncer{}
)

func newSyncer(cfg Config, family v1.IPFamily, balancer *lb.Balancer, status *status) *syncer {
	s := &syncer{
		family:      family,
		nodeName:    cfg.NodeName,
		balancer:    balancer,
		status:      status,
		ports:       make(proxy.ServicePortMap),
		endpointsOf: make(proxy.EndpointsMap),
		changed:     sets.New[proxy.ServicePortName](),
		gone:        sets.New[lb.Frontend](),
		noLocal:     sets.New[proxy.ServicePortName](),
	}
	s.services = proxy.NewServiceChangeTracker(family, nil, s.portsChanged)
	s.endpoints = proxy.NewEndpointsChangeTracker(family, cfg.NodeName, nil, s.endpointsChanged)
	s.runner = runner.NewBoundedFrequencyRunner(fmt.Sprintf("sync %s", family), s.sync, cfg.MinSyncPeriod, retryPeriod, max(time.Hour, cfg.MinSyncPeriod))
	return s
}

// loop syncs when there is something to, until stop is closed.
func (s *syncer) loop(stop <-chan struct{}) {
	s.status.started(s.family)
	s.runner.Loop(stop)
}

// request has the next sync run as soon as it may.
func (s *syncer) request() {
	s.mu.Lock()
	ready := s.servicesSynced && s.slicesSynced
	s.mu.Unlock()
	if ready {
		s.status.queued(s.family)
		s.runner.Run()
	}
}

// OnServiceAdd, OnServiceUpdate and OnServiceDelete note what a Service was and is.
func (s *syncer) OnServiceAdd(service *v1.Service)    { s.OnServiceUpdate(nil, service) }
func (s *syncer) OnServiceDelete(service *v1.Service) { s.OnServiceUpdate(service, nil) }
func (s *syncer) OnServiceUpdate(old, service *v1.Service) {
	if s.services.Update(old, service) {
		s.request()
	}
}

// OnServiceSynced is called once, when every Service of the first list has been seen.
func (s *syncer) OnServiceSynced() {
	s.mu.Lock()
	s.servicesSynced = true
	s.mu.Unlock()
	s.request()
}

// OnEndpointSliceAdd, OnEndpointSliceUpdate and OnEndpointSliceDelete note what a slice is.
func (s *syncer) OnEndpointSliceAdd(slice *discovery.EndpointSlice) { s.sliceChanged(slice, false) }
func (s *syncer) OnEndpointSliceUpdate(_, slice *discovery.EndpointSlice) {
	s.sliceChanged(slice, false)
}
func (s *syncer) OnEndpointSliceDelete(slice *discovery.EndpointSlice) { s.sliceChanged(slice, true) }

func (s *syncer) sliceChanged(slice *discovery.EndpointSlice, remove bool) {
	if s.endpoints.EndpointSliceUpdate(slice, remove) {
		s.request()
	}
}

// OnEndpointSlicesSynced is called once, when every slice of the first list has been seen.
func (s *syncer) OnEndpointSlicesSynced() {
	s.mu.Lock()
	s.slicesSynced = true
	s.mu.Unlock()
	s.request()
}

// OnTopologyChange looks at every port again: which endpoints are near may have changed for all.
func (s *syncer) OnTopologyChange(labels map[string]string) {
	s.mu.Lock()
	s.topology = labels
	for name := range s.ports {
		s.changed.Insert(name)
	}
	s.mu.Unlock()
	s.request()
}

// portsChanged is told by the tracker what a changed Service was and is, inside of sync.
func (s *syncer) portsChanged(previous, current proxy.ServicePortMap) {
	for name, port := range previous {
		s.changed.Insert(name)
		if frontend, ok := frontendOf(port); ok {
			s.gone.Insert(frontend)
		}
	}
	for name := range current {
		s.changed.Insert(name)
	}
}

// endpointsChanged is told by the tracker what a changed Service's endpoints were and are, inside of sync.
func (s *syncer) endpointsChanged(previous, current proxy.EndpointsMap) {
	for _, ports := range []proxy.EndpointsMap{previous, current} {
		for name := range ports {
			s.changed.Insert(name)
		}
	}
}

// sync gives the load balancer what changed since it ran last. An error has it run again after retryPeriod.
func (s *syncer) sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.servicesSynced || !s.slicesSynced {
		return nil
	}
	start := time.Now()
	s.ports.Update(s.services)
	triggers := s.endpointsOf.Update(s.endpoints).LastChangeTriggerTimes
	s.prune()

	changes, names := s.changes()
	err := s.balancer.Sync(changes)
	s.settle(err, names)
	s.status.synced(s.family, start, len(changes), s.noLocal.Len(), triggers, err)
	return err
}

// changes lists what the load balancer shall do about changed and gone, and whose each frontend is.
func (s *syncer) changes() ([]lb.Change, map[lb.Frontend]proxy.ServicePortName) {
	names := make(map[lb.Frontend]proxy.ServicePortName, s.changed.Len())
	changes := make([]lb.Change, 0, s.changed.Len())
	for name := range s.changed {
		port, exists := s.ports[name]
		if !exists {
			s.noLocal.Delete(name)
			continue
		}
		if frontend, ok := frontendOf(port); ok {
			names[frontend] = name
			changes = append(changes, s.changeOf(frontend, name, port))
		}
	}
	for frontend := range s.gone {
		if _, again := names[frontend]; !again {
			changes = append(changes, lb.Change{Frontend: frontend, Withdraw: true})
		}
	}
	return changes, names
}

// changeOf says what a port's frontend shall be: spread over the endpoints that kube-proxy would choose, refused if there
// are none anywhere, and left to the packet path, which drops it, if there are only none here.
func (s *syncer) changeOf(frontend lb.Frontend, name proxy.ServicePortName, port proxy.ServicePort) lb.Change {
	cluster, local, _, anywhere := proxy.CategorizeEndpoints(s.endpointsOf[name], port, s.nodeName, s.topology)
	eligible := cluster
	if port.InternalPolicyLocal() {
		eligible = local
	}
	if len(eligible) == 0 && anywhere {
		s.noLocal.Insert(name)
		return lb.Change{Frontend: frontend, Withdraw: true}
	}
	s.noLocal.Delete(name)

	backends := make([]netip.AddrPort, 0, len(eligible))
	for _, endpoint := range eligible {
		address, err := netip.ParseAddr(endpoint.IP())
		if err != nil {
			klog.ErrorS(err, "Endpoint ignored", "servicePort", name, "endpoint", endpoint)
			continue
		}
		backends = append(backends, netip.AddrPortFrom(address, uint16(endpoint.Port())))
	}
	return lb.Change{Frontend: frontend, Backends: backends}
}

// settle forgets what was done and keeps what failed for the next sync.
func (s *syncer) settle(err error, names map[lb.Frontend]proxy.ServicePortName) {
	s.changed, s.gone = sets.New[proxy.ServicePortName](), sets.New[lb.Frontend]()
	for failed := range frontendErrors(err) {
		name, published := names[failed.Frontend]
		if !published {
			s.gone.Insert(failed.Frontend)
			klog.ErrorS(failed.Err, "Frontend not withdrawn", "frontend", failed.Frontend)
			continue
		}
		s.changed.Insert(name)
		klog.ErrorS(failed.Err, "Service port not programmed", "servicePort", name, "frontend", failed.Frontend)
	}
}

// frontendErrors lists what lb.Balancer's Sync joined.
func frontendErrors(err error) func(yield func(*lb.FrontendError) bool) {
	return func(yield func(*lb.FrontendError) bool) {
		joined, ok := err.(interface{ Unwrap() []error })
		if !ok {
			return
		}
		for _, err := range joined.Unwrap() {
			var failed *lb.FrontendError
			if errors.As(err, &failed) && !yield(failed) {
				return
			}
		}
	}
}

// prune has the frontends withdrawn that a former agent left and no Service has any more. It comes with the first sync,
// which looks at every Service.
func (s *syncer) prune() {
	if s.pruned {
		return
	}
	s.pruned = true
	for frontend := range s.balancer.Frontends() {
		if frontend.Address.Addr().Is4() == (s.family == v1.IPv4Protocol) {
			s.gone.Insert(frontend)
		}
	}
}

// frontendOf is where a port's ClusterIP is served, or false for a protocol that the load balancer does not know.
func frontendOf(port proxy.ServicePort) (lb.Frontend, bool) {
	var protocol lb.Protocol
	switch port.Protocol() {
	case v1.ProtocolTCP:
		protocol = lb.TCP
	case v1.ProtocolUDP:
		protocol = lb.UDP
	default:
		return lb.Frontend{}, false
	}
	address, ok := netip.AddrFromSlice(port.ClusterIP())
	if !ok {
		return lb.Frontend{}, false
	}
	return lb.Frontend{Address: netip.AddrPortFrom(address.Unmap(), uint16(port.Port())), Protocol: protocol}, true
}

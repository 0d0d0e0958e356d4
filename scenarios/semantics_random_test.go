// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

var seedFlag = flag.Uint64("semantics-seed", 0, "seed of TestSemanticsOfRandomServices; 0 takes one from the clock")

// The random fleet: small, because every proxy carries the Services of all sites.
const (
	randomServices  = 8
	randomRounds    = 4
	randomEndpoints = 5
	// perEndpoint questions are asked for each endpoint that may answer. That one of five gets none of 200 is a chance of 2 in 10^19.
	perEndpoint = 40
)

// millionth is what the chi-square statistic of an even choice exceeds once in a million times, by degrees of freedom: the quantile of
// 1 - 10^-6.
var millionth = [randomEndpoints]float64{1: 23.93, 2: 27.63, 3: 30.66, 4: 33.38}

// An anyService is a Service at random, which each site has one of.
type anyService struct {
	name                         string
	ports                        []port
	endpoints                    []endpoint
	affinity, nodePorts          bool
	internalLocal, externalLocal bool
	field                        *field
	subjects                     []*subject
}

// String says what a failure is to be understood by.
func (a *anyService) String() string {
	return fmt.Sprintf("%s over %s %+v, endpoints %+v, affinity %v, local policy: internal %v, external %v", a.name, a.field.name(), a.ports, a.endpoints, a.affinity, a.internalLocal, a.externalLocal)
}

func newAnyService(r *rand.Rand, fields []*field, number int) *anyService {
	a := &anyService{name: fmt.Sprint("any-", number), field: fields[r.IntN(len(fields))], affinity: r.IntN(4) == 0, nodePorts: r.IntN(2) == 0}
	protocols := []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP}
	for i := range 1 + r.IntN(2) {
		a.ports = append(a.ports, port{
			name: fmt.Sprint("p", i), protocol: protocols[r.IntN(2)], port: int32(80 + i), target: []int32{webPort, altPort}[r.IntN(2)],
		})
	}
	a.change(r)
	return a
}

// change draws the endpoints and the policies anew.
func (a *anyService) change(r *rand.Rand) {
	a.endpoints = nil
	for _, number := range r.Perm(listening)[:r.IntN(randomEndpoints+1)] {
		e := endpoint{at: []string{"near", "far"}[r.IntN(2)], number: number}
		switch r.IntN(6) {
		case 0:
			e = e.notReady()
		case 1:
			e = e.terminates()
		}
		a.endpoints = append(a.endpoints, e)
	}
	a.internalLocal, a.externalLocal = r.IntN(4) == 0, a.nodePorts && r.IntN(3) == 0
}

// apply makes a Service what it has been drawn to be.
func (a *anyService) apply(_ *site, s *corev1.Service) {
	internal, external := corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyCluster
	if a.internalLocal {
		internal = corev1.ServiceInternalTrafficPolicyLocal
	}
	if a.externalLocal {
		external = corev1.ServiceExternalTrafficPolicyLocal
	}
	s.Spec.InternalTrafficPolicy = &internal
	if a.affinity {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	if a.nodePorts {
		s.Spec.Type, s.Spec.ExternalTrafficPolicy = corev1.ServiceTypeNodePort, external
	}
}

// write brings the API server up to date.
func (a *anyService) write(t *testing.T) {
	t.Helper()
	for i, s := range a.field.sites {
		if len(a.subjects) <= i {
			subject := s.newSubject(a.name+"-"+s.mode, slices.Clone(a.ports), a.apply)
			subject.create(t)
			a.subjects = append(a.subjects, subject)
		} else {
			a.subjects[i].update(t, a.apply)
		}
		a.subjects[i].setEndpoints(t, a.endpoints...)
	}
}

// eligible are the endpoints that may answer, and what comes of asking if none may (KEP-1669 for those that terminate).
func (a *anyService) eligible(local bool) (these []endpoint, none string) {
	none = refused
	pick := func(where, state func(endpoint) bool) (picked []endpoint) {
		for _, e := range a.endpoints {
			if where(e) && state(e) {
				picked = append(picked, e)
			}
		}
		return picked
	}
	anywhere, here := func(endpoint) bool { return true }, func(e endpoint) bool { return e.at == "near" }
	ready, serving := func(e endpoint) bool { return !e.unready }, func(e endpoint) bool { return e.serving && e.terminating }
	where := anywhere
	if local {
		where = here
		if len(pick(anywhere, ready))+len(pick(anywhere, serving)) > 0 {
			none = silence
		}
	}
	if these = pick(where, ready); len(these) == 0 {
		these = pick(where, serving)
	}
	return these, none
}

// In every mode clients of random Services reach the same endpoints, each of them as often as the others.
func TestSemanticsOfRandomServices(t *testing.T) {
	fields := mustOpenFields(t, func(*clusters.ProxySpec) {})
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-semantics-seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var fleet []*anyService
	for i := range randomServices {
		fleet = append(fleet, newAnyService(r, fields, i))
	}
	for round := range randomRounds {
		for _, a := range fleet {
			if round > 0 && r.IntN(2) == 0 {
				continue
			}
			if round > 0 {
				a.change(r)
			}
			a.write(t)
		}
		for _, f := range fields {
			f.settle(t)
		}
		var asking sync.WaitGroup
		for i := range fields[0].sites {
			asking.Go(func() {
				for _, a := range fleet {
					a.check(t, round, a.subjects[i])
				}
			})
		}
		asking.Wait()
	}
}

// check asks a Service on one node at all of its ports.
func (a *anyService) check(t *testing.T, round int, s *subject) {
	ask := func(client string, p port, to target, local bool) {
		if s.leavesOut(client) != "" {
			return
		}
		these, none := a.eligible(local)
		q := Question{Network: "tcp", Address: to(s), N: perEndpoint * len(these), Patience: patiently}
		if p.protocol == corev1.ProtocolUDP {
			q.Network = "udp"
		}
		if len(these) == 0 {
			q.N = 1
		}
		if len(these) == 0 && none == silence {
			q.Patience = briefly
		}
		got := s.guests[client].ask(q)
		var servers []string
		for _, e := range these {
			servers = append(servers, join(s.address(e.at, e.number), p.target))
		}
		if complaint := a.judge(got, servers, none); complaint != "" {
			t.Errorf("%s: round %d: %s %s from %s: %s, want one of %v or else %s: %v; %v", s.mode, round, q.Network, q.Address, client, complaint, servers, none, got, a)
		}
	}
	for _, p := range a.ports {
		ask("pod", p, clusterIP(int(p.port)), a.internalLocal)
	}
	if a.nodePorts {
		ask("outsider", a.ports[0], nodePort(nodeIP), a.externalLocal)
	}
}

// judge says what is wrong with an outcome; empty when nothing is.
func (a *anyService) judge(got Outcome, servers []string, none string) string {
	switch {
	case len(servers) == 0:
		if len(got.Servers) > 0 || got.Errors[none] != 1 {
			return "another end"
		}
		return ""
	case len(got.Errors) > 0:
		return "errors"
	case a.affinity:
		if len(got.Servers) != 1 {
			return "affinity to several"
		}
		for server := range got.Servers {
			if !slices.Contains(servers, server) {
				return "an endpoint that is not eligible"
			}
		}
		return ""
	}
	slices.Sort(servers)
	if !slices.Equal(slices.Sorted(maps.Keys(got.Servers)), servers) {
		return "other endpoints"
	}
	var statistic float64
	for _, n := range got.Servers {
		statistic += float64((n-perEndpoint)*(n-perEndpoint)) / perEndpoint
	}
	if statistic > millionth[len(servers)-1] {
		return fmt.Sprintf("an uneven choice, chi-square %.1f", statistic)
	}
	return ""
}

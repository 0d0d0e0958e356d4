// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/kindtest"
	"github.com/plimsoll-bench/plimsoll/scenarios/e2e"
)

// someSpecs are some of those by which Kubernetes tests Services, quick ones of each kind.
const someSpecs = `Services should (serve (a basic endpoint|endpoints on same port and different protocols|multiport)|be rejected when|allow pods to hairpin|have session affinity work|` +
	`be able to create a functioning NodePort|respect internalTrafficPolicy=Local Pod to Pod|preserve source pod IP|support externalTrafficPolicy=Local|fallback to local terminating|` +
	`implement NodePort and HealthCheckNodePort)|IPv6DualStack\] should create service with ipv6,v4 cluster ip|Traffic Distribution should route traffic to an endpoint in the same zone when using PreferClose`

// The embedded load balancer passes Kubernetes' own tests of Services, over both families and over IPv6 alone; other tests of kind are over IPv4.
func TestE2E(t *testing.T) {
	bin, err := filepath.Abs("../bin")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(bin, "plimsoll") // pods run it, too
	e, cache := kindtest.Engine(t, program)
	if err := kind.Enough(t.Context(), e, e2e.Nodes, 0); err != nil {
		t.Skip(err)
	}
	if err := e2e.Parts(bin, cache); err != nil {
		t.Skip(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	if said, err := exec.Command(program, "e2e", "--modes", "ebpf", "--families", "dual,ipv6", "--focus", someSpecs, "--cache", cache, "--out", out).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	rows := mustReadCSV(t, filepath.Join(out, e2e.TableFile))
	for _, r := range rows[1:] {
		if e2e.Outcome(r[4]) != e2e.Passed {
			t.Errorf("%s: %s: %s", r[0], r[4], r[6])
		}
	}
	if passed := len(rows) - 1; passed < 24 {
		t.Errorf("%d specs were run, want a dozen in each of two clusters: %v", passed, rows)
	}
}

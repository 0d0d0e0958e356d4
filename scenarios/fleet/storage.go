// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
)

// storageWriters is how many writes are under way at once. Etcd takes those that wait together into one round of its log.
const storageWriters = 64

// storageWriter writes into etcd, beside the API server, the bytes that the API server would have written. It knows them from
// a template of each kind that the API server stored, so whatever a version of it adds (defaults, managed fields) is there.
type storageWriter struct {
	etcd      *clientv3.Client
	prefix    string
	namespace string
	codec     runtime.Serializer

	address *networkingv1.IPAddress
	slice   *discoveryv1.EndpointSlice
	service *corev1.Service
}

var _ writer = (*storageWriter)(nil)

// newStorageWriter makes a Service and its slice through the API, reads back what is stored for them and deletes them.
func newStorageWriter(ctx context.Context, client kubernetes.Interface, etcd *clientv3.Client, prefix string, plan Plan) (w *storageWriter, err error) {
	w = &storageWriter{etcd: etcd, prefix: prefix, namespace: plan.Namespace, codec: protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)}
	template := plan.service(0, plan.serviceAddr(0))
	template.Name = "template"
	slices, services := client.DiscoveryV1().EndpointSlices(plan.Namespace), client.CoreV1().Services(plan.Namespace)
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		for _, gone := range []error{
			services.Delete(clean, template.Name, metav1.DeleteOptions{}),
			slices.Delete(clean, template.Name, metav1.DeleteOptions{}),
		} {
			if gone != nil && !apierrors.IsNotFound(gone) {
				err = errors.Join(err, fmt.Errorf("remove the template Service: %w", gone))
			}
		}
	}()
	if _, err := slices.Create(ctx, newSlice(plan, template), metav1.CreateOptions{}); err != nil {
		return nil, fmt.Errorf("template slice: %w", err)
	}
	// The API server chooses the address, as it does for most Services.
	wish := newService(plan, template)
	wish.Spec.ClusterIP = ""
	made, err := services.Create(ctx, wish, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("template service: %w", err)
	}
	for k, name := range [kinds]string{kindIPAddress: made.Spec.ClusterIP, kindSlice: template.Name, kindService: template.Name} {
		if err := w.learn(ctx, kind(k), name); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// learn reads the stored object of a kind as the template. Storage that we would not write byte by byte the same, because it
// is encrypted or of a version with fields that ours has not, is an error.
func (w *storageWriter) learn(ctx context.Context, k kind, name string) error {
	key := w.key(k, name)
	got, err := w.etcd.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("template %s: %w", key, err)
	}
	if len(got.Kvs) != 1 {
		return fmt.Errorf("template %s: not in this etcd; is %s the API server's prefix?", key, w.prefix)
	}
	stored := got.Kvs[0].Value
	obj, _, err := w.codec.Decode(stored, nil, nil)
	if err != nil {
		return fmt.Errorf("template %s: %w", key, err)
	}
	var same bytes.Buffer
	if err := w.codec.Encode(obj, &same); err != nil {
		return fmt.Errorf("template %s: %w", key, err)
	}
	if !bytes.Equal(same.Bytes(), stored) {
		return fmt.Errorf("template %s: the API server stores %d bytes where we would write %d others: its version is not ours", key, len(stored), same.Len())
	}
	switch o := obj.(type) {
	case *networkingv1.IPAddress:
		w.address = o
	case *discoveryv1.EndpointSlice:
		w.slice = o
	case *corev1.Service:
		w.service = o
	default:
		return fmt.Errorf("template %s: stored as %T, which we do not write", key, obj)
	}
	return nil
}

// key is where the API server stores an object.
func (w *storageWriter) key(k kind, name string) string {
	switch k {
	case kindIPAddress:
		return w.prefix + "/ipaddresses/" + name
	case kindSlice:
		return w.prefix + "/endpointslices/" + w.namespace + "/" + name
	default:
		return w.prefix + "/services/specs/" + w.namespace + "/" + name
	}
}

// object is the object of a kind of s, with its name. It shares with the template what is the same in all.
func (w *storageWriter) object(k kind, s Service, now metav1.Time) (runtime.Object, string) {
	switch k {
	case kindIPAddress:
		o := *w.address
		ref := *o.Spec.ParentRef
		ref.Name = s.Name
		o.Spec.ParentRef = &ref
		o.ObjectMeta = fresh(o.ObjectMeta, s.Address.Addr().String(), now)
		return &o, o.Name
	case kindSlice:
		o := *w.slice
		o.ObjectMeta = fresh(o.ObjectMeta, s.Name, now)
		o.Labels = newLabels(s)
		o.Endpoints = newEndpoints(s)
		return &o, o.Name
	default:
		o := *w.service
		o.ObjectMeta = fresh(o.ObjectMeta, s.Name, now)
		o.Spec.ClusterIP = s.Address.Addr().String()
		o.Spec.ClusterIPs = []string{o.Spec.ClusterIP}
		return &o, o.Name
	}
}

// fresh is the template's metadata for a new object that was made now.
func fresh(m metav1.ObjectMeta, name string, now metav1.Time) metav1.ObjectMeta {
	m.Name = name
	m.UID = uuid.NewUUID()
	m.CreationTimestamp = now
	m.ManagedFields = slices.Clone(m.ManagedFields)
	for i := range m.ManagedFields {
		m.ManagedFields[i].Time = &now
	}
	return m
}

// create never overwrites: an object that somebody made meanwhile is an error that names it.
//
// Note: 120 puts a transaction were tried, and are ten times as quick to write. But all of a transaction have one resource
// version, and the API server counts on one object a version: whoever's watch ends in the middle of them, as busy watches do,
// and goes on from that version is never sent the others. Our own watch missed 64 of 500 slices that way.
func (w *storageWriter) create(ctx context.Context, k kind, services []Service, wrote func(int)) error {
	now := metav1.Now().Rfc3339Copy()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(storageWriters)
	for _, s := range services {
		group.Go(func() error {
			obj, name := w.object(k, s, now)
			var value bytes.Buffer
			if err := w.codec.Encode(obj, &value); err != nil {
				return fmt.Errorf("encode %s %s: %w", k, name, err)
			}
			key := w.key(k, name)
			done, err := w.etcd.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).Then(clientv3.OpPut(key, value.String())).Commit()
			if err != nil {
				return fmt.Errorf("write %s: %w", key, err)
			}
			if !done.Succeeded {
				return fmt.Errorf("write %s: somebody else made it meanwhile", key)
			}
			wrote(1)
			return nil
		})
	}
	return group.Wait()
}

func (w *storageWriter) remove(ctx context.Context, k kind, names []string, wrote func(int)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(storageWriters)
	for _, name := range names {
		group.Go(func() error {
			if _, err := w.etcd.Delete(ctx, w.key(k, name)); err != nil {
				return fmt.Errorf("delete %s: %w", w.key(k, name), err)
			}
			wrote(1)
			return nil
		})
	}
	return group.Wait()
}
